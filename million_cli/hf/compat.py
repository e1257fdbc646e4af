"""Differences among transformers 5.17 to 5.23 that matter to a cache."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from million_cli.errors import UserError


def tokens_to_remove(argument: int, length: int) -> int:
    """The number of tokens that `Cache.crop(argument)` removes from a cache of `length` tokens.

    A negative argument removes that many tokens, in every version.  A positive one is the length to keep:
    5.17 still accepts it as deprecated, 5.18 and later refuse it in their own layers.  Ours accept both,
    and pass on the negative form, which all versions understand.

    >>> tokens_to_remove(-3, 10), tokens_to_remove(8, 10), tokens_to_remove(12, 10)
    (3, 2, 0)
    """
    if argument > 0:
        return max(0, length - argument)
    return min(-argument, length)


def check_held(cache: Cache, tokens: int) -> None:
    """Check that a model kept its text in the cache that it was given.

    Some models drop or replace it: Phi-3 with longrope reads the text again, into a dense cache, where its
    rotary embedding changes.  Such a run does not measure the cache.

    Raises:
        UserError: the cache holds another number of tokens.
    """
    held = int(cache.get_seq_length())
    if held != tokens and type(cache) is not DynamicCache:
        raise UserError(
            f"the model did not keep its text in the cache: of {tokens} tokens it holds {held}; accepted are "
            "texts below the length at which the model replaces its cache"
        )


def embedding_changes_at(config: PreTrainedConfig) -> int | None:
    """The length beyond which a model embeds all positions anew (longrope), or None.

    Keys that were cached before have another embedding.
    """
    text_config = config.get_text_config(decoder=True)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(
        text_config, "original_max_position_embeddings", None
    )
