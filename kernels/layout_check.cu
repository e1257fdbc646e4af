// The fragment orders as numbers, which a test compares with those of million_cli/ops/fragment.py.
#include "layout.cuh"

namespace million {

// Folds the positions of all codes of a group, by token and subspace.
template <int D, int M>
constexpr uint32_t fold(Layout layout) {
  uint32_t folded = 0;
  for (int token = 0; token < kGroupTokens; ++token)
    for (int s = 0; s < M; ++s) folded = folded * 31 + uint32_t(group_position<D, M>(layout, token, s));
  return folded;
}

}  // namespace million

#define MILLION_CHECK_ORDER(D, M, KEYS, VALUES)                                     \
  static_assert(million::fold<D, M>(million::Layout::kFragmentKeys) == KEYS, "keys"); \
  static_assert(million::fold<D, M>(million::Layout::kFragmentValues) == VALUES, "values");

MILLION_CHECK_ORDER(64, 64, 0xad140200, 0x6c9c6800)
MILLION_CHECK_ORDER(64, 32, 0x7b3f0000, 0xa7623000)
MILLION_CHECK_ORDER(64, 16, 0xef573c00, 0xf9a00800)
MILLION_CHECK_ORDER(64, 8, 0x50e18d00, 0xb08bc000)
MILLION_CHECK_ORDER(128, 128, 0xba280400, 0x6738d000)
MILLION_CHECK_ORDER(128, 64, 0x493e0000, 0x83446000)
MILLION_CHECK_ORDER(128, 32, 0x23bf0000, 0x33623000)
MILLION_CHECK_ORDER(128, 16, 0xd2673c00, 0x1f700800)
