"""What the kernels raise, besides ValueError for arguments that do not fit together.

```text
KernelError
└── KernelUnavailable     an implementation was asked for by name and cannot run here; the message says why
```
"""


class KernelError(Exception):
    """Base of this package's errors."""


class KernelUnavailable(KernelError):
    """The implementation that was asked for cannot run on this device, dtype or head dimension."""
