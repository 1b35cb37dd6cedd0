"""What the kernels raise, besides ValueError for arguments that do not fit together.

```text
KernelError
├── KernelUnavailable     an implementation was asked for by name and cannot run here; the message says why
├── CompilationFailed     a variant did not compile for an architecture; the message names both
└── GateFailed            a compiled kernel is not what it should be; the message names the first and what is wrong
```
"""


class KernelError(Exception):
    """Base of this package's errors."""


class KernelUnavailable(KernelError):
    """The implementation that was asked for cannot run on this device, dtype or head dimension."""


class CompilationFailed(KernelError):
    """Triton or ptxas refused a variant; the message names it and says what they said."""


class GateFailed(KernelError):
    """Compiled kernels spill, miss instructions or do not fit; the message names the first."""
