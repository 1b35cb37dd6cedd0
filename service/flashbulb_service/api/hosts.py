"""Whether a request is meant for this server: a name that a stranger points at loopback is not ours."""

import re
from collections.abc import Collection, Sequence

from flashbulb_service.tenants.access import is_loopback

# Who asks for these comes by a bare address or a service's name: kubelet, Docker, Prometheus. The answers hold no
# addresses of ours, and the metrics ask for a key wherever others could come from.
PROBES = frozenset({"/livez", "/readyz", "/metrics"})
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


def accepts(hosts: Sequence[str], *, path: str, bound_to: str, allowed: Collection[str]) -> bool:
    """Decide over the Host headers of one request, by the address the server is bound to.

    None at all (HTTP/1.0) is accepted: addresses in answers are then those of the socket. So is any name for a probe,
    but on loopback, where a stranger's page could read it.
    """
    if not hosts:
        return True
    found = _HOST.fullmatch(hosts[0])
    if len(hosts) > 1 or found is None:
        return False
    name = found[1].lower()
    if is_loopback(bound_to):
        return is_loopback(name) or name in allowed
    return not allowed or name in allowed or path in PROBES
