"""Every key of the queue, in one place: Python formats these templates, and so do the Lua scripts.

All keys of a namespace share its hash tag `{name}`, so they live in one slot of a Redis Cluster.
In each template the first %s is that tag. Whatever has no TTL gives its reason:

key                   type   holds                                    ends
job:<id>              HASH   the job                                  TTL once ended; live, it is the work
b:<model>:<bucket>:<tenant>  ZSET  queued id -> due time          empty when its last job is claimed
due:<model>:<bucket>  ZSET   queued id -> due time, all tenants       empty when its last job is claimed
t:<model>:<bucket>    ZSET   tenant -> device time used (order only)  empty when its last job is claimed
ready:<model>         ZSET   bucket -> earliest due time in it        empty with the model's backlog
waiting:<model>       ZSET   queued id -> enqueue time                empty with the model's backlog
models                SET    models that have a backlog               empty with the last backlog
used                  ZSET   tenant -> device ms charged over weight  deleted with the last backlog
clock                 HASH   model -> least used of those that wait   field deleted with the model's backlog
wake:<model>          LIST   at most one token for sleeping workers   deleted with the model's backlog
leases                ZSET   running id -> lease expiry               empty when nothing runs
delayed               ZSET   id -> retry time                         empty when nothing is delayed
deadlines             ZSET   queued or delayed id -> deadline         empty with the jobs that have one
inuse                 HASH   tenant -> live jobs; "" -> all of them   fields deleted at 0
dead                  ZSET   failed id -> time of death               TTL; bounded in number
busy                  ZSET   worker -> predicted end of its batch of short work  TTL
long                  ZSET   worker -> the same of long work, which runs beside it  empty when none runs
alive                 ZSET   worker -> end of what it last announced  TTL
speed:<model>:<bucket> HASH  worker -> alive until, floor, base, row, cap  TTL
idem:<tenant>:<hash>  STR    request hash and ids                     TTL
gates                 HASH   model -> paused or draining              an operator's word: until the next one
residence             HASH   model -> unloaded, or wanted and since when an operator's word: until the next
aliases               HASH   other name -> model                      an operator's word: until the next one
apikey:<id>           HASH   an API key: name, hash, scopes, limits   the access itself; revoked: TTL
apikeys               ZSET   id of an API key -> time it was made     bounded in number
rate:<id>             HASH   an API key's tokens                      TTL
usage:<id>:<day>      HASH   what an API key used on a day            TTL
spent:<id>:<s>:<n>    STR    device us of a budget's period           TTL
finished:<window>     STR    jobs ended in a 10 s window              TTL
ev:<id>               STREAM what became of a watched request         TTL; bounded in length
evctl:<instance>      STREAM wakes one process's event reader         TTL
list:<name>           ZSET   request id -> enqueue time               TTL; bounded in number
hooks                 ZSET   request id -> next delivery of its hook  empty with the last delivery or surrender
hooks:wake            LIST   at most one token for delivery loops     empty when taken
done:<instance>       -      pub/sub channel of one waiting process   not a key
"""

import hashlib
import re
from dataclasses import dataclass
from types import MappingProxyType

TEMPLATES = MappingProxyType(
    {
        "job": "%s:job:%s",
        "bucket": "%s:b:%s:%s:%s",
        "due": "%s:due:%s:%s",
        "tenants": "%s:t:%s:%s",
        "ready": "%s:ready:%s",
        "waiting": "%s:waiting:%s",
        "models": "%s:models",
        "used": "%s:used",
        "busy": "%s:busy",
        "long": "%s:long",
        "alive": "%s:alive",
        "speed": "%s:speed:%s:%s",
        "clock": "%s:clock",
        "wake": "%s:wake:%s",
        "leases": "%s:leases",
        "delayed": "%s:delayed",
        "deadlines": "%s:deadlines",
        "inuse": "%s:inuse",
        "dead": "%s:dead",
        "idempotency": "%s:idem:%s:%s",
        "gates": "%s:gates",
        "residence": "%s:residence",
        "aliases": "%s:aliases",
        "apikey": "%s:apikey:%s",
        "apikeys": "%s:apikeys",
        "rate": "%s:rate:%s",
        "usage": "%s:usage:%s:%s",
        "spent": "%s:spent:%s:%s:%s",
        "finished": "%s:finished:%s",
        "done": "%s:done:%s",
        "events": "%s:ev:%s",
        "events_control": "%s:evctl:%s",
        "list": "%s:list:%s",
        "hooks": "%s:hooks",
        "hooks_wake": "%s:hooks:wake",
    }
)

_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one namespace."""

    namespace: str

    def __post_init__(self) -> None:
        if not _NAMESPACE.fullmatch(self.namespace):
            raise ValueError(
                f"a queue namespace must be 1 to 100 letters, digits or any of ._- , got {self.namespace!r}"
            )

    @property
    def tag(self) -> str:
        """The hash tag that every key starts with; it also routes the scripts."""
        return "{" + self.namespace + "}"

    def job(self, job_id: str) -> str:
        """Hash of one job."""
        return TEMPLATES["job"] % (self.tag, job_id)

    def due(self, model: str, bucket: str) -> str:
        """Sorted set of a bucket's queued jobs of all tenants."""
        return TEMPLATES["due"] % (self.tag, model, bucket)

    def speed(self, model: str, bucket: str) -> str:
        """Hash of the times that workers have published of a bucket."""
        return TEMPLATES["speed"] % (self.tag, model, bucket)

    def wake(self, model: str) -> str:
        """List that sleeping workers of a model block on."""
        return TEMPLATES["wake"] % (self.tag, model)

    def done(self, instance: str) -> str:
        """Channel on which one process hears that jobs have ended."""
        return TEMPLATES["done"] % (self.tag, instance)

    def events(self, request_id: str) -> str:
        """Stream of what became of one request."""
        return TEMPLATES["events"] % (self.tag, request_id)

    def events_control(self, instance: str) -> str:
        """Stream that wakes the event reader of one process."""
        return TEMPLATES["events_control"] % (self.tag, instance)

    def listing(self, name: str) -> str:
        """Sorted set of the requests of one list."""
        return TEMPLATES["list"] % (self.tag, name)

    def hooks_wake(self) -> str:
        """List that delivery loops block on."""
        return TEMPLATES["hooks_wake"] % self.tag

    @property
    def gates(self) -> str:
        """Hash of the models that are paused or drained."""
        return TEMPLATES["gates"] % self.tag

    @property
    def residence(self) -> str:
        """Hash of the models that operators have loaded or unloaded."""
        return TEMPLATES["residence"] % self.tag

    @property
    def aliases(self) -> str:
        """Hash of the other names that operators have given to models."""
        return TEMPLATES["aliases"] % self.tag

    @property
    def dead(self) -> str:
        """Sorted set of the dead letters."""
        return TEMPLATES["dead"] % self.tag

    def api_key(self, key_id: str) -> str:
        """Hash of one API key."""
        return TEMPLATES["apikey"] % (self.tag, key_id)

    @property
    def api_keys(self) -> str:
        """Sorted set of the ids of all API keys."""
        return TEMPLATES["apikeys"] % self.tag

    def usage(self, key_id: str, day: int) -> str:
        """Hash of what an API key used on a day, counted from the epoch."""
        return TEMPLATES["usage"] % (self.tag, key_id, day)

    def pattern(self) -> str:
        """Match every key of the namespace, for SCAN."""
        return self.tag + ":*"


def digest(text: str) -> str:
    """Shorten a caller's idempotency key, which may be long or hold any character."""
    return hashlib.sha256(text.encode()).hexdigest()
