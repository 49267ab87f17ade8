"""How each library is imported and called in place of one of our operations.

Every call takes the arguments of the operation in `archs.ops` that it stands in for, `backend`
excepted, and returns the same. What a library lacks and plain PyTorch can add around it (a decay
formed from logits, a short convolution) is added here, and is part of its time; anything else
raises NotImplementedError. Libraries are imported by the first call.

Letters as in `archs.ops`: B batch, T tokens, S keys or earlier tokens, H heads, D channels.
"""

import importlib
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from archs.ops.wkv7 import DECAY_BOUND, log_decay_of

INSTALL_MAMBA_SSM = (
    "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "
    "pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1"
)
HALF = (torch.float16, torch.bfloat16)
NO_SDPA_KERNEL = ("No available kernel", "No viable backend")  # CUDA's words, and the CPU's
MINIMAL_BLOCK = 64  # tokens a chunk of `ssd_minimal`, as in its self-test
MAMBA_CHUNK = 256  # the default of `mamba_ssm.modules.mamba2.Mamba2`
FLASH_FFT_SIZES = (256, 1 << 22)  # least and most points of FlashFFTConv's transforms
FLASH_FFT_FUSED = 1 << 15  # beyond it, channels come in multiples of 16


class PeerUnavailableError(ImportError):
    """A library to compare with is not installed; the message says how to install it."""


# Attention.


def sdpa(kernel: SDPBackend) -> Callable[..., Tensor]:
    """`torch.nn.functional.scaled_dot_product_attention` by one of its kernels and no other."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        T, S = q.shape[1], k.shape[1]
        if window is not None and window < S:
            raise NotImplementedError("SDPA has no sliding window")
        if lengths is not None:
            raise NotImplementedError("SDPA has no ragged lengths")
        bias = None
        if 1 < T < S:  # `is_causal` aligns the mask at the start: that is another function
            from torch.nn.attention.bias import causal_lower_right  # takes seconds

            bias = causal_lower_right(T, S)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        try:
            with sdpa_kernel(kernel):
                y = F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=bias,
                    is_causal=T == S > 1,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
        except RuntimeError as error:
            if any(words in str(error) for words in NO_SDPA_KERNEL):
                raise NotImplementedError(
                    f"SDPA's {kernel.name} does not take q {tuple(q.shape)} and k "
                    f"{tuple(k.shape)} in {q.dtype} on {q.device.type}"
                ) from error
            raise
        return y.transpose(1, 2)

    return call


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, lengths: Tensor | None = None
) -> Tensor:
    """`flash_attn_func`, and for one query without gradients `flash_attn_with_kvcache`.

    Its mask is aligned at the end, as ours; query heads may share keys.
    """
    if lengths is not None:
        raise NotImplementedError("flash_attn_func has no ragged lengths")
    if q.dtype not in HALF:
        raise NotImplementedError(f"flash-attn takes float16 and bfloat16, not {q.dtype}")
    library = importlib.import_module("flash_attn")
    reach = (-1, -1) if window is None else (window - 1, 0)  # keys before and after the query's
    decodes = q.shape[1] == 1 and not torch.is_grad_enabled()
    function = library.flash_attn_with_kvcache if decodes else library.flash_attn_func
    return function(q, k, v, causal=True, window_size=reach)


# State space dual.


@cache
def import_mamba_ssm() -> ModuleType:
    """The package `mamba_ssm`, also where its CUDA extension is not built.

    The package imports Mamba-1's extension, `selective_scan_cuda`, which its Mamba-2 path, Triton
    throughout, never calls. Where it is missing an empty module stands in for it.

    Raises:
        PeerUnavailableError: mamba-ssm is not installed.
        ImportError: something that it needs is not, or its extension does not load.
    """
    if find_spec("mamba_ssm") is None:
        raise PeerUnavailableError(f"mamba-ssm is not installed; run: {INSTALL_MAMBA_SSM}")
    extension = "selective_scan_cuda"
    if extension not in sys.modules and find_spec(extension) is None:
        sys.modules[extension] = ModuleType(extension, "Stands in for Mamba-1's CUDA extension.")
    return importlib.import_module("mamba_ssm")


def mamba_ssm(
    x: Tensor,
    log_decay: Tensor | None,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    *,
    dt: Tensor | None = None,
    skip: Tensor | None = None,
    rate: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`mamba_chunk_scan_combined`, which takes the rate A (H,) where ours takes A dt.

    Without `rate`, A is read off the first token: log_decay[0, 0] / dt[0, 0]. That is right where
    log_decay is dt times one number a head, as in Mamba-2, and so are the gradients there: all of
    dL/dA reaches log_decay[0, 0], from which a block's A_log takes it with the factor dt[0, 0];
    and what reaches dt[0, 0] by way of the division, -A/dt[0, 0] dL/dA, is what log_decay[0, 0] =
    A dt[0, 0] hands back to it with the opposite sign.

    With `rate` (H,), A itself, log_decay is None. dt is required.
    """
    if dt is None:
        raise NotImplementedError("mamba_chunk_scan_combined needs dt")
    if x.dtype == torch.float64:
        raise NotImplementedError("mamba_ssm's kernels do not take float64")
    import_mamba_ssm()
    library = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    if rate is None:
        assert log_decay is not None
        rate = log_decay[0, 0] / dt[0, 0]
    found = library.mamba_chunk_scan_combined(
        x,
        dt,
        rate,
        b,
        c,
        MAMBA_CHUNK,
        D=skip,
        initial_states=state,
        return_final_states=state is not None,
    )
    return (found, None) if state is None else found


@cache
def ssd_minimal_discrete() -> Callable[..., tuple[Tensor, Tensor]]:
    """Listing 1 of the Mamba-2 paper (arXiv 2405.21060), as mamba-ssm ships it.

    Returns:
        A function (X, A, B, C, block_len, initial_states=None) -> (Y, final_state): X (B, T, H, P)
        already multiplied by dt; A (B, T, H), the log-decay; B and C (B, T, H, N); initial_states
        (B, 1, H, P, N); final_state (B, H, P, N); T a multiple of block_len.

    Raises:
        PeerUnavailableError: mamba-ssm is not installed.
    """
    package = find_spec("mamba_ssm")
    if package is None or not package.submodule_search_locations:
        raise PeerUnavailableError(f"mamba-ssm is not installed; run: {INSTALL_MAMBA_SSM}")
    path = Path(package.submodule_search_locations[0], "modules", "ssd_minimal.py")
    # Importing the package takes seconds and needs Triton, so the file is executed by itself. It
    # takes one kernel from the package, which only its self-test calls.
    stand_in = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    stand_in.mamba_chunk_scan_combined = None  # type: ignore[attr-defined]
    spec = spec_from_file_location("mamba_ssm_ssd_minimal", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    before = sys.modules.get(stand_in.__name__)
    sys.modules[stand_in.__name__] = stand_in
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[stand_in.__name__]
        if before is not None:
            sys.modules[stand_in.__name__] = before
    return module.ssd_minimal_discrete


def ssd_minimal(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    *,
    dt: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The paper's listing, in float32 at least; T padded, groups expanded, dt and skip around."""
    T, H = x.shape[1:3]
    wide = torch.promote_types(x.dtype, torch.float32)
    u = x.to(wide) if dt is None else x.to(wide) * dt.to(wide)[..., None]
    b, c = (part.to(wide).repeat_interleave(H // part.shape[2], 2) for part in (b, c))
    padding = -T % MINIMAL_BLOCK
    u, b, c = (F.pad(part, (0, 0, 0, 0, 0, padding)) for part in (u, b, c))
    log_decay = F.pad(log_decay.to(wide), (0, 0, 0, padding))
    start = None if state is None else state.to(wide).unsqueeze(1)
    y, end = ssd_minimal_discrete()(u, log_decay, b, c, MINIMAL_BLOCK, start)
    y = y[:, :T]
    if skip is not None:
        y = y + skip.to(wide)[:, None] * x.to(wide)
    return y.to(x.dtype), None if state is None else end


# WKV-7.


def fla(
    r: Tensor,
    log_decay: Tensor | None,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    decay_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_rwkv7` of flash-linear-attention, told how far a decay can go.

    Its `lower_bound` licenses chunks of 64 and tensor cores throughout. It takes no logits: the
    log-decay is formed before it.
    """
    if r.dtype == torch.float64:
        raise NotImplementedError("fla's kernels do not take float64")
    library = importlib.import_module("fla.ops.rwkv7")
    if decay_logits is not None:
        log_decay = log_decay_of(decay_logits)
    y, end = library.chunk_rwkv7(
        r,
        log_decay,
        k,
        v,
        a,
        b,
        initial_state=state,
        output_final_state=state is not None,
        lower_bound=-DECAY_BOUND,
    )
    return y, end


# Long convolution.


def torch_fft(
    u: Tensor,
    filter: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
    short_filters: Tensor | None = None,
    short_bias: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """`torch.fft.rfft` and `irfft` of twice the length, in float32 at least; the rest around."""
    compute = torch.promote_types(u.dtype, torch.float32)
    post, pre, z = _convolved((post_gate, pre_gate, u), short_filters, short_bias, compute)
    assert z is not None
    if pre is not None:
        z = pre * z
    seen = z if history is None else torch.cat((history.to(compute), z), 2)
    T, L = u.shape[2], seen.shape[2]
    taps = filter[:, :L].to(compute)
    spectrum = torch.fft.rfft(seen, n=2 * L) * torch.fft.rfft(taps, n=2 * L)
    y = torch.fft.irfft(spectrum, n=2 * L)[..., L - T : L]
    if skip is not None:
        y = y + skip.to(compute)[:, None] * z
    if post is not None:
        y = post * y
    return y.to(u.dtype)


def flashfftconv(
    u: Tensor,
    filter: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
    short_filters: Tensor | None = None,
    short_bias: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """`FlashFFTConv` of the next power of two, gates fused; the skip is added to the first tap.

    Its own short convolution is a module with parameters of its own: PyTorch's runs before it.
    """
    if u.dtype not in HALF:
        raise NotImplementedError(f"FlashFFTConv takes float16 and bfloat16, not {u.dtype}")
    T, S = u.shape[2], 0 if history is None else history.shape[2]
    padding = -(S + T) % 4  # lengths are multiples of 2, and of 4 at two of the sizes
    size = max(FLASH_FFT_SIZES[0], 1 << (2 * (S + T) - 1).bit_length())
    if size > FLASH_FFT_SIZES[1]:
        raise NotImplementedError(f"FlashFFTConv has no transform of {size} points")
    if size > FLASH_FFT_FUSED and u.shape[1] % 16:
        raise NotImplementedError(
            f"FlashFFTConv of {size} points takes multiples of 16 channels, not {u.shape[1]}"
        )
    post, pre, z = _convolved((post_gate, pre_gate, u), short_filters, short_bias, u.dtype)
    assert z is not None
    taps = filter[:, : S + T].float()
    if skip is not None:
        taps = torch.cat((taps[:, :1] + skip.float()[:, None], taps[:, 1:]), 1)
    gates = []
    if S == 0 and pre is not None and post is not None:
        gates, pre, post = [pre, post], None, None
    if pre is not None:
        z = pre * z
    if history is not None:
        z = torch.cat((history, z), 2)
    signals = [F.pad(x, (0, padding)).contiguous() for x in (z, *gates)]
    y = _flash_fft(size, u.dtype, u.device)(signals[0], taps.contiguous(), *signals[1:])
    y = y[..., S : S + T]
    return y if post is None else post * y


@cache
def _flash_fft(size: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """One module for all layers, as its authors recommend."""
    return importlib.import_module("flashfftconv").FlashFFTConv(size, dtype=dtype).to(device)


def _convolved(
    signals: tuple[Tensor | None, ...],
    short_filters: Tensor | None,
    short_bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """The signals (B, D, T) in `dtype`, each after its short convolution if there are any."""
    signals = tuple(None if x is None else x.to(dtype) for x in signals)
    if short_filters is None:
        return signals
    biases = [None] * 3 if short_bias is None else short_bias.to(dtype).unbind(0)
    found = []
    for x, taps, bias in zip(signals, short_filters.to(dtype).unbind(0), biases, strict=True):
        assert x is not None
        D, T = x.shape[1:]
        found.append(F.conv1d(x, taps.unsqueeze(1), bias, padding=2, groups=D)[..., :T])
    return tuple(found)
