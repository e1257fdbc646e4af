// torch on one side, the launchers on the other: checks, pointers, stream.  The only file that knows torch, through
// its stable ABI, so that one binary serves torch 2.11 and later.  The schemas are in million_cli/ops/compiled.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "launch.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using OptionalTensor = std::optional<Tensor>;

std::string shape_of(const Tensor& x) {
  std::string text = "[";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

// `dims` of -1 match anything.
void check(const Tensor& x, const char* name, ScalarType type, std::initializer_list<int64_t> dims,
           bool contiguous = true) {
  bool same = x.dim() == int64_t(dims.size());
  std::string wanted = "[";
  int64_t i = 0;
  for (const int64_t d : dims) {
    same = same && (d < 0 || x.size(i) == d);
    wanted += (i ? ", " : "") + (d < 0 ? std::string("*") : std::to_string(d));
    ++i;
  }
  STD_TORCH_CHECK(same, name, " has shape ", shape_of(x), ", expected ", wanted, "]");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " ", shape_of(x), " has the wrong dtype");
  STD_TORCH_CHECK(x.is_cuda(), name, " ", shape_of(x), " is not on a CUDA device");
  STD_TORCH_CHECK(!contiguous || x.is_contiguous(), name, " ", shape_of(x), " is not contiguous");
}

million::Dtype dtype_of(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, name, " ", shape_of(x),
                  " must be float16 or bfloat16");
  return type == ScalarType::Half ? million::Dtype::kHalf : million::Dtype::kBFloat16;
}

void check_launch(cudaError_t error, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(error == cudaSuccess, name, " of ", shape_of(x), ": ", cudaGetErrorString(error));
}

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream);
  STD_TORCH_CHECK(error == 0, "no current stream on device ", x.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

const float* rotation_pointer(const OptionalTensor& rotation, const char* name, int64_t heads, int64_t D, int* count) {
  *count = 1;
  if (!rotation.has_value()) return nullptr;
  check(*rotation, name, ScalarType::Float, {-1, D, D});
  *count = int(rotation->size(0));
  STD_TORCH_CHECK(*count == 1 || *count == heads, name, " ", shape_of(*rotation), ": one matrix, or one for each of ",
                  heads, " heads");
  return static_cast<const float*>(rotation->data_ptr());
}

million::Quantizer quantizer(const Tensor& centroids, const OptionalTensor& rotation, const char* name, int64_t heads,
                             int64_t D) {
  STD_TORCH_CHECK(centroids.dim() == 4, name, " centroids have shape ", shape_of(centroids), ", expected [Hc, M, 256, dsub]");
  const int64_t M = centroids.size(1);
  check(centroids, name, ScalarType::Float, {-1, M, million::kCentroids, D / M});
  STD_TORCH_CHECK(centroids.size(0) == 1 || centroids.size(0) == heads, name, " centroids ", shape_of(centroids),
                  ": one set, or one for each of ", heads, " heads");
  million::Quantizer q;
  q.centroids = static_cast<const float*>(centroids.data_ptr());
  q.centroid_heads = int(centroids.size(0));
  q.rotation = rotation_pointer(rotation, "rotation", heads, D, &q.rotation_heads);
  return q;
}

million::CodePages code_pages(const Tensor& codes, const OptionalTensor& block_table, int64_t batch, int64_t heads,
                              int64_t page_size, int64_t M, int64_t layout) {
  STD_TORCH_CHECK(page_size > 0 && page_size % 16 == 0 && page_size <= 256, "page_size=", page_size,
                  ": a multiple of 16 up to 256");
  STD_TORCH_CHECK(layout >= 0 && layout <= 3, "layout=", layout, ": 0 to 3");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.is_cuda() && codes.is_contiguous(), "codes ",
                  shape_of(codes), " must be contiguous uint8 on a CUDA device");
  million::CodePages pages;
  pages.codes = static_cast<uint8_t*>(codes.data_ptr());
  pages.page_size = int(page_size);
  pages.kv_heads = int(heads);
  pages.layout = static_cast<million::Layout>(layout);
  pages.block_table = nullptr;
  if (block_table.has_value()) {
    check(*block_table, "block_table", ScalarType::Int, {batch, -1});
    STD_TORCH_CHECK(codes.numel() % (heads * page_size * M) == 0, "pool ", shape_of(codes), " is no whole number of pages of ",
                    heads, " heads of ", page_size * M, " bytes");
    pages.block_table = static_cast<const int*>(block_table->data_ptr());
    pages.table_width = int(block_table->size(1));
  } else {
    STD_TORCH_CHECK(codes.numel() % (batch * heads * page_size * M) == 0, "codes ", shape_of(codes),
                    " are no whole number of pages of ", page_size * M, " bytes for each of ", batch * heads, " heads");
    pages.table_width = int(codes.numel() / (batch * heads * page_size * M));
  }
  return pages;
}

void encode(Tensor x, Tensor centroids, OptionalTensor rotation, Tensor codes, OptionalTensor block_table,
            OptionalTensor workspace, int64_t start, int64_t page_size, int64_t layout) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cuda(), "x has shape ", shape_of(x), ", expected [B, Hkv, T, D] on a CUDA device");
  const int64_t B = x.size(0), H = x.size(1), T = x.size(2), D = x.size(3);
  million::EncodeParams p;
  p.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(x.stride(3) == 1 && x.stride(2) % 2 == 0 && x.stride(1) % 2 == 0 && x.stride(0) % 2 == 0, "x ",
                  shape_of(x), " must be dense in its last dimension");
  STD_TORCH_CHECK(T % 16 == 0 && start % 16 == 0 && start >= 0, "tokens ", start, " .. ", start + T, " of x ",
                  shape_of(x), ": multiples of 16");
  p.quantizer = quantizer(centroids, rotation, "x", H, D);
  const int64_t M = centroids.size(1);
  p.pages = code_pages(codes, block_table, B, H, page_size, M, layout);
  STD_TORCH_CHECK(start + T <= int64_t(p.pages.table_width) * page_size, "tokens ", start, " .. ", start + T,
                  " of x ", shape_of(x), " pass the end of codes ", shape_of(codes));
  if (B * H * T == 0) return;
  STD_TORCH_CHECK(B * H <= 65535, "x ", shape_of(x), ": at most 65535 heads in all");
  p.grids = {nullptr, nullptr}, p.sorted = {nullptr, nullptr};
  if (workspace.has_value()) {
    STD_TORCH_CHECK(D == M || D == 2 * M, "workspace for centroids ", shape_of(centroids),
                    ": it is for subspaces of one or two dims");
    const int64_t subspaces = centroids.size(0) * M;
    const int64_t bytes = subspaces * (D == M ? million::kSortedBytes : million::kGridBytes);
    STD_TORCH_CHECK(workspace->scalar_type() == ScalarType::Byte && workspace->is_cuda() && workspace->is_contiguous() &&
                        workspace->numel() >= bytes && reinterpret_cast<uintptr_t>(workspace->data_ptr()) % 16 == 0,
                    "workspace ", shape_of(*workspace), ": uint8 on the device, aligned, at least ", bytes);
    if (D == M) {
      p.sorted.values = static_cast<float*>(workspace->data_ptr());
      p.sorted.codes = reinterpret_cast<uint8_t*>(p.sorted.values + subspaces * million::kCentroids);
    } else {
      p.grids.frames = static_cast<million::GridFrame*>(workspace->data_ptr());
      p.grids.lists = reinterpret_cast<uint2*>(p.grids.frames + subspaces);
    }
  }
  p.x = x.data_ptr();
  p.stride_batch = x.stride(0), p.stride_head = x.stride(1), p.stride_token = x.stride(2);
  p.batch = int(B), p.tokens = int(T), p.start = int(start);
  const DeviceGuard guard(x.get_device_index());
  check_launch(million::launch_encode(p, int(D), int(M), stream_of(x)), "pq_encode", x);
}

million::AppendSide append_side(const Tensor& x, const Tensor& window, const Tensor& centroids,
                                const OptionalTensor& rotation, const Tensor& codes, const OptionalTensor& block_table,
                                int64_t page_size, int64_t layout, const char* name) {
  const int64_t B = x.size(0), H = x.size(1), D = x.size(2), M = centroids.size(1);
  STD_TORCH_CHECK(x.stride(2) == 1, name, " ", shape_of(x), " must be dense in the last dimension");
  check(window, "window", x.scalar_type(), {B, H, -1, D});
  million::AppendSide side;
  side.x = x.data_ptr();
  side.stride_batch = x.stride(0), side.stride_head = x.stride(1);
  side.window = window.data_ptr();
  side.quantizer = quantizer(centroids, rotation, name, H, D);
  side.pages = code_pages(codes, block_table, B, H, page_size, M, layout);
  return side;
}

void append(Tensor keys, Tensor values, Tensor lengths, Tensor key_window, Tensor value_window, Tensor key_codes,
            Tensor value_codes, OptionalTensor block_table, Tensor key_centroids, Tensor value_centroids,
            OptionalTensor key_rotation, OptionalTensor value_rotation, int64_t page_size, int64_t key_layout,
            int64_t value_layout) {
  STD_TORCH_CHECK(keys.dim() == 3, "keys have shape ", shape_of(keys), ", expected [B, Hkv, D]");
  const int64_t B = keys.size(0), H = keys.size(1), D = keys.size(2);
  million::AppendParams p;
  p.dtype = dtype_of(keys, "keys");
  check(keys, "keys", keys.scalar_type(), {B, H, D}, false);
  check(values, "values", keys.scalar_type(), {B, H, D}, false);
  check(lengths, "lengths", ScalarType::Int, {B});
  if (B * H == 0) return;
  p.keys = append_side(keys, key_window, key_centroids, key_rotation, key_codes, block_table, page_size, key_layout, "keys");
  p.values =
      append_side(values, value_window, value_centroids, value_rotation, value_codes, block_table, page_size, value_layout, "values");
  const int64_t R = key_window.size(2);
  STD_TORCH_CHECK(value_window.size(2) == R && R % page_size == 0 && R > page_size, "windows ", shape_of(key_window), " and ",
                  shape_of(value_window), ": the same multiple of page_size=", page_size, ", larger than it");
  p.lengths = static_cast<const int*>(lengths.data_ptr());
  p.batch = int(B), p.residual = int(R);
  const DeviceGuard guard(keys.get_device_index());
  check_launch(million::launch_append(p, int(D), int(key_centroids.size(1)), int(value_centroids.size(1)), stream_of(keys)),
               "append", keys);
}

void paged_decode(Tensor q, Tensor key_pool, Tensor value_pool, Tensor block_table, Tensor lengths,
                  OptionalTensor first_valid, Tensor key_table, Tensor value_table, OptionalTensor key_rotation,
                  OptionalTensor value_rotation, Tensor key_window, Tensor value_window, Tensor workspace, Tensor out,
                  double scale, int64_t page_size, int64_t heads, int64_t blocks) {
  STD_TORCH_CHECK(q.dim() == 3, "q has shape ", shape_of(q), ", expected [B, Hq, D]");
  STD_TORCH_CHECK(key_pool.dim() == 4 && value_pool.dim() == 4, "pools ", shape_of(key_pool), " and ", shape_of(value_pool),
                  ", expected [pages, Hkv, P / 16, 16 * M]");
  const int64_t B = q.size(0), Hq = q.size(1), D = q.size(2), Hkv = key_pool.size(1);
  const int64_t MK = key_pool.size(3) / 16, MV = value_pool.size(3) / 16, N = key_pool.size(0);
  million::PagedDecodeParams p;
  p.dtype = dtype_of(q, "q");
  check(q, "q", q.scalar_type(), {B, Hq, D});
  check(out, "out", q.scalar_type(), {B, Hq, D});
  STD_TORCH_CHECK(page_size > 0 && page_size % 16 == 0 && page_size <= 256, "page_size=", page_size,
                  ": a multiple of 16 up to 256");
  check(key_pool, "key_pool", ScalarType::Byte, {N, Hkv, page_size / 16, 16 * MK});
  check(value_pool, "value_pool", ScalarType::Byte, {N, Hkv, page_size / 16, 16 * MV});
  STD_TORCH_CHECK(Hkv > 0 && Hq % Hkv == 0, "q ", shape_of(q), " has no whole number of heads for each of ", Hkv,
                  " key/value heads");
  check(block_table, "block_table", ScalarType::Int, {B, -1});
  check(lengths, "lengths", ScalarType::Int, {B});
  if (first_valid.has_value()) check(*first_valid, "first_valid", ScalarType::Int, {B});
  check(key_table, "key_table", ScalarType::Half, {-1, million::kCentroids, D});
  check(value_table, "value_table", ScalarType::Half, {-1, million::kCentroids, D});
  for (const Tensor* table : {&key_table, &value_table})
    STD_TORCH_CHECK(table->size(0) == 1 || table->size(0) == Hkv, "table ", shape_of(*table),
                    ": one set, or one for each of ", Hkv, " heads");
  const int64_t R = key_window.dim() == 4 ? key_window.size(2) : 0;
  check(key_window, "key_window", q.scalar_type(), {B, Hkv, R, D});
  check(value_window, "value_window", q.scalar_type(), {B, Hkv, R, D});
  STD_TORCH_CHECK(R % page_size == 0 && R > page_size, "key_window ", shape_of(key_window), ": a multiple of page_size=",
                  page_size, " tokens, larger than it");
  STD_TORCH_CHECK(scale > 0, "scale=", scale, ": positive");
  STD_TORCH_CHECK((heads == 1 || heads == 4 || heads == 8) && blocks > 0, "heads=", heads, " (1, 4 or 8), blocks=",
                  blocks);
  if (B == 0) return;
  const int64_t G = Hq / Hkv, head_sets = (G + heads - 1) / heads, sets = B * Hkv * head_sets;
  const int64_t spans = (sets * 8 + 255) / 256 * 256;
  const int64_t bytes = spans + (blocks + sets) * million::partial_floats(int(D), int(heads)) * 4;
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.is_cuda() && workspace.numel() >= bytes,
                  "workspace ", shape_of(workspace), ": uint8 on the device, at least ", bytes);
  p.q = q.data_ptr(), p.out = out.data_ptr();
  p.key_pool = static_cast<const uint8_t*>(key_pool.data_ptr());
  p.value_pool = static_cast<const uint8_t*>(value_pool.data_ptr());
  p.block_table = static_cast<const int*>(block_table.data_ptr());
  p.lengths = static_cast<const int*>(lengths.data_ptr());
  p.first_valid = first_valid.has_value() ? static_cast<const int*>(first_valid->data_ptr()) : nullptr;
  p.key_table = static_cast<const __half*>(key_table.data_ptr());
  p.value_table = static_cast<const __half*>(value_table.data_ptr());
  p.key_rotation = rotation_pointer(key_rotation, "key_rotation", Hkv, D, &p.key_rotation_heads);
  p.value_rotation = rotation_pointer(value_rotation, "value_rotation", Hkv, D, &p.value_rotation_heads);
  p.key_window = key_window.data_ptr(), p.value_window = value_window.data_ptr();
  p.spans = static_cast<int2*>(workspace.data_ptr());
  p.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(workspace.data_ptr()) + spans);
  p.scale = float(scale);
  p.batch = int(B), p.kv_heads = int(Hkv), p.group = int(G), p.head_sets = int(head_sets);
  p.page_size = int(page_size), p.residual = int(R), p.table_width = int(block_table.size(1)), p.grid = int(blocks);
  p.by_page_size = million::Divider(p.page_size), p.by_page_groups = million::Divider(p.page_size / million::kGroupTokens);
  p.by_residual = million::Divider(p.residual), p.by_head_sets = million::Divider(p.head_sets);
  p.by_grid = million::Divider(p.grid);
  p.key_table_heads = int(key_table.size(0)), p.value_table_heads = int(value_table.size(0));
  const DeviceGuard guard(q.get_device_index());
  const million::DecodeShape shape{int(D), int(MK), int(MV), int(heads)};
  check_launch(million::launch_paged_decode(p, shape, stream_of(q)), "paged_decode", q);
}

void contiguous_decode(Tensor q, Tensor key_codes, Tensor value_codes, Tensor lengths, OptionalTensor first_valid,
                       Tensor key_table, Tensor value_table, OptionalTensor key_rotation, OptionalTensor value_rotation,
                       Tensor key_window, Tensor value_window, Tensor workspace, Tensor out, double scale,
                       int64_t page_size, int64_t value_layout, int64_t splits) {
  STD_TORCH_CHECK(q.dim() == 3, "q has shape ", shape_of(q), ", expected [B, Hq, D]");
  STD_TORCH_CHECK(key_codes.dim() == 4, "key_codes have shape ", shape_of(key_codes), ", expected [B, Hkv, capacity, M]");
  const int64_t B = q.size(0), Hq = q.size(1), D = q.size(2), Hkv = key_codes.size(1);
  const int64_t capacity = key_codes.size(2), MK = key_codes.size(3);
  million::LookupDecodeParams p;
  p.dtype = dtype_of(q, "q");
  check(q, "q", q.scalar_type(), {B, Hq, D});
  check(out, "out", q.scalar_type(), {B, Hq, D});
  STD_TORCH_CHECK(page_size > 0 && page_size % 16 == 0 && page_size <= 256, "page_size=", page_size,
                  ": a multiple of 16 up to 256");
  STD_TORCH_CHECK(capacity > 0 && capacity % page_size == 0, "key_codes ", shape_of(key_codes),
                  ": capacity a multiple of page_size=", page_size);
  STD_TORCH_CHECK(Hkv > 0 && Hq % Hkv == 0, "q ", shape_of(q), " has no whole number of heads for each of ", Hkv,
                  " key/value heads");
  STD_TORCH_CHECK(value_layout == 0 || value_layout == 1, "value_layout=", value_layout, ": 0 (rows) or 1 (transposed)");
  check(key_codes, "key_codes", ScalarType::Byte, {B, Hkv, capacity, MK});
  int64_t MV = 0;
  if (value_layout == 0) {
    check(value_codes, "value_codes", ScalarType::Byte, {B, Hkv, capacity, -1});
    MV = value_codes.size(3);
  } else {
    check(value_codes, "value_codes", ScalarType::Byte, {B, Hkv, capacity / page_size, -1, page_size});
    MV = value_codes.size(3);
  }
  check(lengths, "lengths", ScalarType::Int, {B});
  if (first_valid.has_value()) check(*first_valid, "first_valid", ScalarType::Int, {B});
  for (const Tensor* table : {&key_table, &value_table}) {
    check(*table, "table", ScalarType::Half, {-1, million::kCentroids, D});
    STD_TORCH_CHECK(table->size(0) == 1 || table->size(0) == Hkv, "table ", shape_of(*table),
                    ": one set, or one for each of ", Hkv, " heads");
  }
  const int64_t R = key_window.dim() == 4 ? key_window.size(2) : 0;
  check(key_window, "key_window", q.scalar_type(), {B, Hkv, R, D});
  check(value_window, "value_window", q.scalar_type(), {B, Hkv, R, D});
  STD_TORCH_CHECK(R % page_size == 0 && R > page_size, "key_window ", shape_of(key_window), ": a multiple of page_size=",
                  page_size, " tokens, larger than it");
  STD_TORCH_CHECK(scale > 0, "scale=", scale, ": positive");
  STD_TORCH_CHECK(splits > 0 && splits <= 65535, "splits=", splits);
  if (B == 0) return;
  const int64_t counters = (B * Hq * 4 + 255) / 256 * 256, bytes = counters + B * Hq * splits * (2 * D + 4) * 4;
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.is_cuda() && workspace.numel() >= bytes,
                  "workspace ", shape_of(workspace), ": uint8 on the device, at least ", bytes);
  p.q = q.data_ptr(), p.out = out.data_ptr();
  p.key_codes = static_cast<const uint8_t*>(key_codes.data_ptr());
  p.value_codes = static_cast<const uint8_t*>(value_codes.data_ptr());
  p.lengths = static_cast<const int*>(lengths.data_ptr());
  p.first_valid = first_valid.has_value() ? static_cast<const int*>(first_valid->data_ptr()) : nullptr;
  p.key_table = static_cast<const __half*>(key_table.data_ptr());
  p.value_table = static_cast<const __half*>(value_table.data_ptr());
  p.key_rotation = rotation_pointer(key_rotation, "key_rotation", Hkv, D, &p.key_rotation_heads);
  p.value_rotation = rotation_pointer(value_rotation, "value_rotation", Hkv, D, &p.value_rotation_heads);
  p.key_window = key_window.data_ptr(), p.value_window = value_window.data_ptr();
  p.counters = static_cast<int*>(workspace.data_ptr());
  p.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(workspace.data_ptr()) + counters);
  p.scale = float(scale), p.capacity = capacity;
  p.batch = int(B), p.kv_heads = int(Hkv), p.group = int(Hq / Hkv), p.page_size = int(page_size), p.residual = int(R);
  p.key_table_heads = int(key_table.size(0)), p.value_table_heads = int(value_table.size(0));
  p.value_layout = static_cast<million::Layout>(value_layout);
  const DeviceGuard guard(q.get_device_index());
  check_launch(million::launch_lookup_decode(p, int(D), int(MK), int(MV), int(splits), stream_of(q)), "contiguous_decode", q);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(million, CUDA, m) {
  m.impl("pq_encode", TORCH_BOX(&encode));
  m.impl("append", TORCH_BOX(&append));
  m.impl("paged_decode", TORCH_BOX(&paged_decode));
  m.impl("contiguous_decode", TORCH_BOX(&contiguous_decode));
}
