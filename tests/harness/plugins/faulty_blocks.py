"""Blocks that break in every way a cell can, for the tests of the runner."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import torch

from archs.mamba2 import Mamba2Block


class Segfault(Mamba2Block):
    def forward(self, x, state=None, carry=None):
        ctypes.string_at(0)


class Abort(Mamba2Block):
    def forward(self, x, state=None, carry=None):
        print("terminate called for want of sense", file=sys.stderr, flush=True)
        os.abort()


class Hang(Mamba2Block):
    """Deaf to signals, with a child of its own that the tests look for."""

    def forward(self, x, state=None, carry=None):
        subprocess.Popen(["sleep", os.environ.get("SEQSCALE_TEST_SLEEP", "60.5")])
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        while True:
            time.sleep(1)


class Hungry(Mamba2Block):
    """Takes all the memory it is allowed; the tests set a limit."""

    def forward(self, x, state=None, carry=None):
        return [torch.empty(1 << 26) for _ in range(1 << 10)]


class HungryInPython(Mamba2Block):
    def forward(self, x, state=None, carry=None):
        return [bytearray(1 << 28) for _ in range(1 << 10)]


class HungryInCpp(Mamba2Block):
    def forward(self, x, state=None, carry=None):
        print("terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr)
        os.abort()


class Wrong(Mamba2Block):
    def forward(self, x, state=None, carry=None):
        return super().forward(x, state, carry)._replace(x=1.001 * x)


class Exit(Mamba2Block):
    def forward(self, x, state=None, carry=None):
        sys.exit("a block should not do this")


class Killed(Mamba2Block):
    def forward(self, x, state=None, carry=None):
        os.kill(os.getpid(), signal.SIGKILL)


class Raises(Mamba2Block):
    def forward(self, x, state=None, carry=None):
        raise ZeroDivisionError("a\nbug \x1b[31m")


class OutOfResources(Exception):  # noqa: N818 (Triton's name)
    """What Triton raises where a kernel needs more than the device has."""


class TooLarge(Mamba2Block):
    def forward(self, x, state=None, carry=None):
        raise OutOfResources("shared memory, required: 300000, limit: 232448")


class Chatty(Mamba2Block):
    """Prints more than a pipe holds, without a newline, and is otherwise well."""

    def forward(self, x, state=None, carry=None):
        sys.stdout.write("x" * 300_000)
        return super().forward(x, state, carry)
