"""Library implementations of our operations: what there is, and what can be imported here.

A peer is measured beside ours (`harness.versus`), or stands in for ours inside a block, where it is
asked for by name. How each is called is in `harness.peer_calls`.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn.attention import SDPBackend

from archs.block import Block
from archs.ops.attention import attention
from archs.ops.long_conv import long_conv
from archs.ops.ssd import ssd
from archs.ops.wkv7 import DECAY_BOUND, wkv7
from harness import peer_calls
from harness.environment import installed_version
from harness.peer_calls import (
    INSTALL_MAMBA_SSM,
    PeerUnavailableError,
    import_mamba_ssm,
    ssd_minimal_discrete,
)
from harness.worker import one_line

__all__ = [
    "OUR_OPERATIONS",
    "PEERS",
    "Peer",
    "PeerUnavailableError",
    "StandIn",
    "import_mamba_ssm",
    "restore",
    "ssd_minimal_discrete",
    "stand_in",
]

# What peers stand in for.
OUR_OPERATIONS: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "ssd": ssd,
    "wkv7": wkv7,
    "long_conv": long_conv,
}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library's implementation of one of our operations."""

    name: str  # as in `Case.implementation`
    op: str  # attention | ssd | wkv7 | long_conv
    package: str  # the distribution whose version counts
    options: Mapping[str, Any]  # with which it is called, for the record
    call: Callable[..., Any]  # the operation's arguments but `backend`; see `harness.peer_calls`
    load: Callable[[], object]  # imports what `call` needs
    remedy: str = ""  # how it is installed
    needs_gpu: bool = True
    in_triton: bool = False  # its kernels are Triton's

    @property
    def version(self) -> str | None:
        """The installed version, or None."""
        return installed_version(self.package)

    @property
    def has_step(self) -> bool:
        """Whether a token can be decoded with it: attention's step is the same call."""
        return self.op == "attention"

    def unavailable(self, device: str) -> str | None:
        """Why it cannot run on "cpu" or "cuda", in one line with the remedy; None if it can."""
        if self.needs_gpu and device != "cuda":
            return "needs an NVIDIA GPU"
        try:
            self.load()
        except PeerUnavailableError as error:  # its message ends with the command
            return one_line(f"not importable because {error}")
        except Exception as error:  # a library may raise anything while it is imported
            said = f"not importable because {type(error).__name__}: {error}"
            return one_line(f"{said}; {self.remedy}" if self.remedy else said)
        return None

    def record(self) -> dict[str, Any]:
        """What a measurement's environment says of it."""
        return {"package": self.package, "version": self.version, "options": dict(self.options)}


def _importing(module: str) -> Callable[[], object]:
    return lambda: importlib.import_module(module)


def _sdpa(name: str, kernel: SDPBackend, *, needs_gpu: bool = True) -> Peer:
    """PyTorch's attention by one kernel."""
    return Peer(
        name=name,
        op="attention",
        package="torch",
        options={"sdpa_kernel": kernel.name, "is_causal": "T = S", "causal_lower_right": "T < S"},
        call=peer_calls.sdpa(kernel),
        load=_importing("torch"),
        needs_gpu=needs_gpu,
    )


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        _sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION, needs_gpu=False),
        _sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
        _sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
        _sdpa("sdpa-math", SDPBackend.MATH, needs_gpu=False),
        Peer(
            name="flash-attn",
            op="attention",
            package="flash-attn",
            options={"causal": True, "T = 1": "flash_attn_with_kvcache"},
            call=peer_calls.flash_attn,
            load=_importing("flash_attn"),
            remedy="run: pip install --no-build-isolation flash-attn",
        ),
        Peer(
            name="mamba_ssm",
            op="ssd",
            package="mamba-ssm",
            options={"chunk_size": peer_calls.MAMBA_CHUNK},
            call=peer_calls.mamba_ssm,
            load=import_mamba_ssm,
            remedy=f"run: {INSTALL_MAMBA_SSM}",
            in_triton=True,
        ),
        Peer(
            name="ssd-minimal",
            op="ssd",
            package="mamba-ssm",
            options={"block_len": peer_calls.MINIMAL_BLOCK},
            call=peer_calls.ssd_minimal,
            load=ssd_minimal_discrete,
            remedy=f"run: {INSTALL_MAMBA_SSM}",
            needs_gpu=False,
        ),
        Peer(
            name="fla",
            op="wkv7",
            package="fla-core",
            options={"lower_bound": -DECAY_BOUND, "chunk_size": "its own for that bound: 64"},
            call=peer_calls.fla,
            load=_importing("fla.ops.rwkv7"),
            remedy="run: pip install fla-core",
            in_triton=True,
        ),
        Peer(
            name="torch-fft",
            op="long_conv",
            package="torch",
            options={"n": "2 T", "short_filters": "torch.nn.functional.conv1d"},
            call=peer_calls.torch_fft,
            load=_importing("torch"),
            needs_gpu=False,
        ),
        Peer(
            name="flashfftconv",
            op="long_conv",
            package="flashfftconv",
            options={
                "seqlen": "the least power of two >= 2 T",
                "pregate, postgate": "fused",
                "short_filters": "torch.nn.functional.conv1d",
            },
            call=peer_calls.flashfftconv,
            load=_importing("flashfftconv"),
            remedy="see https://github.com/HazyResearch/flash-fft-conv",
        ),
    )
}


class StandIn:
    """A peer with the signature of the operation that it stands in for.

    A block's backend governs its other operations, and whether this one is the reference.
    """

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def __call__(self, *arguments: Any, backend: str, **options: Any) -> Any:
        """The peer's call; backend "reference" is the definition, which is ours."""
        if backend == "reference":
            return OUR_OPERATIONS[self.peer.op](*arguments, backend=backend, **options)
        return self.peer.call(*arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StandIn":
        return self  # it holds nothing that changes


def stand_in(peer: Peer, blocks: Iterable[Block]) -> None:
    """Put a peer in place of the operation of every block that calls ours.

    Raises:
        NotImplementedError: no block does.
    """
    calling = [b for b in blocks if getattr(b, "operation", None) is OUR_OPERATIONS[peer.op]]
    if not calling:
        raise NotImplementedError(f"{peer.name} implements {peer.op}, which no block here calls")
    for block in calling:
        block.operation = StandIn(peer)


def restore(blocks: Iterable[Block]) -> None:
    """Give blocks our operation back, where a peer stands in for it."""
    for block in blocks:
        operation = getattr(block, "operation", None)
        if isinstance(operation, StandIn):
            block.operation = OUR_OPERATIONS[operation.peer.op]
