"""The menu of sequence architectures, and the two builders.

`build_block` and `build_model` are all that most users need; the blocks follow the contract of
`archs.block`. A third party adds a block class through the entry-point group `seqscale.blocks`.
"""

import sys
import warnings
from contextlib import redirect_stdout
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch

from archs.block import Block, BlockConfig, BlockOutput
from archs.hyena import HyenaBlock
from archs.mamba2 import Mamba2Block
from archs.model import LanguageModel, expand_pattern
from archs.ops import BACKENDS, Backend
from archs.rwkv7 import RWKV7Block
from archs.transformer import TransformerBlock

__all__ = [
    "ARCHITECTURES",
    "Backend",
    "Block",
    "BlockConfig",
    "BlockOutput",
    "LanguageModel",
    "architectures",
    "block_class",
    "build_block",
    "build_model",
    "resolve_backend",
]

ARCHITECTURES: dict[str, type[Block]] = {
    "transformer": TransformerBlock,
    "mamba2": Mamba2Block,
    "rwkv7": RWKV7Block,
    "hyena": HyenaBlock,
}


@cache
def architectures() -> dict[str, type[Block]]:
    """The menu with installed plug-ins; a plug-in that does not load is one warning."""
    menu = dict(ARCHITECTURES)
    for entry in entry_points(group="seqscale.blocks"):
        package = entry.dist.name if entry.dist else "an unknown package"
        try:
            with redirect_stdout(sys.stderr):  # standard output belongs to the caller
                block = entry.load()
        except (Exception, SystemExit) as error:
            warnings.warn(f"plug-in {entry.name!r} of {package} ignored: {error}", stacklevel=2)
            continue
        is_block = isinstance(block, type) and issubclass(block, Block)
        if entry.name in ARCHITECTURES or not is_block or not hasattr(block, "Config"):
            warnings.warn(
                f"plug-in {entry.name!r} of {package} ignored: it must be a Block with a Config, "
                "under a new name",
                stacklevel=2,
            )
            continue
        menu[entry.name] = block
    return menu


def block_class(name: str) -> type[Block]:
    """The block class of an architecture; ValueError with the nearest name if there is none."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    menu = architectures()
    if name in menu:
        return menu[name]
    close = get_close_matches(name, menu, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown architecture {name!r}, expected one of {', '.join(menu)}{hint}")


def resolve_backend(
    backend: str, pattern: str, device: torch.device | str | None = None
) -> Backend:
    """The backend that "auto" stands for; any other is returned as it is.

    Args:
        backend: "auto" is our Triton kernels ("triton") on an NVIDIA GPU, for architectures that
            all have them, else "torch".
        pattern: an architecture or a hybrid.
        device: where it will run; None means on a GPU if PyTorch sees one.

    Raises:
        ValueError: there is no such backend or architecture.
    """
    if backend == "auto":
        if torch.version.hip is not None:  # AMD's, which PyTorch calls cuda too
            on_gpu = False
        elif device is None:
            on_gpu = torch.cuda.is_available()
        else:
            on_gpu = torch.device(device).type == "cuda"
        blocks = [block_class(name) for name in expand_pattern(pattern)]
        kernels = all(block.has_kernels for block in blocks) and find_spec("triton") is not None
        return "triton" if on_gpu and kernels else "torch"
    if backend not in BACKENDS:
        close = get_close_matches(backend, ("auto", *BACKENDS), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown backend {backend!r}, expected auto or one of {', '.join(BACKENDS)}{hint}"
        )
    return cast(Backend, backend)


def build_block(
    name: str,
    *,
    layer_index: int = 0,
    depth: int = 1,
    kind_index: int | None = None,
    backend: Backend | Literal["auto"] = "auto",
    **fields: Any,
) -> Block:
    """Build one block of an architecture.

    Args:
        name: architecture, a key of the menu.
        layer_index: place in the stack (RWKV-7's initialisation depends on it).
        depth: number of blocks in the stack.
        kind_index: place among the blocks of the same architecture; default `layer_index`.
        backend: "auto" is resolved here, once, by `resolve_backend`.
        **fields: the fields of the architecture's `Config` (`width`, `max_len`, ...).

    Raises:
        ValueError: unknown architecture, or a configuration that cannot be built.
        TypeError: a field that the architecture does not have.
    """
    block = block_class(name)
    return block(
        block.Config(**fields),
        layer_index=layer_index,
        depth=depth,
        kind_index=kind_index,
        backend=resolve_backend(backend, name),
    )


def build_model(
    pattern: str,
    *,
    width: int,
    depth: int | None = None,
    vocab_size: int = 256,
    max_len: int = 2048,
    backend: Backend | Literal["auto"] = "auto",
    tie_embeddings: bool = False,
    options: dict[str, dict[str, Any]] | None = None,
) -> LanguageModel:
    """Build a language model: embedding, blocks, norm, head.

    Args:
        pattern: an architecture, or a hybrid such as "mamba2*3+transformer".
        width: width D of the residual stream.
        depth: number of blocks; the pattern is repeated to fill it. Default: the pattern once.
        vocab_size: number of tokens V (256: bytes).
        max_len: longest sequence; only Hyena's filter depends on it.
        backend: "auto" is resolved here, once, by `resolve_backend`.
        tie_embeddings: share the embedding's weight with the head.
        options: further `Config` fields by architecture, as {"transformer": {"kv_heads": 2}}.

    Raises:
        ValueError: unknown architecture, a depth that the pattern does not divide, or options
            for an architecture that is not in the pattern.
    """
    names = expand_pattern(pattern, depth)
    backend = resolve_backend(backend, pattern)
    options = options or {}
    if unused := sorted(set(options) - set(names)):
        raise ValueError(f"options for {', '.join(unused)}, not in the pattern {pattern!r}")
    blocks = [
        build_block(
            name,
            layer_index=index,
            depth=len(names),
            kind_index=names[:index].count(name),
            backend=backend,
            width=width,
            max_len=max_len,
            **options.get(name, {}),
        )
        for index, name in enumerate(names)
    ]
    return LanguageModel(blocks, width=width, vocab_size=vocab_size, tie_embeddings=tie_embeddings)
