from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("interval",)
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    interval: float
    def __init__(self, interval: _Optional[float] = ...) -> None: ...

class TreeStatus(_message.Message):
    __slots__ = ("schema", "time", "tier", "cloud", "run", "edges", "clients", "totals", "faults")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    CLOUD_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    schema: int
    time: float
    tier: str
    cloud: CloudStatus
    run: RunStatus
    edges: _containers.RepeatedCompositeFieldContainer[EdgeStatus]
    clients: _containers.RepeatedCompositeFieldContainer[ClientStatus]
    totals: Totals
    faults: _containers.RepeatedCompositeFieldContainer[FaultNote]
    def __init__(self, schema: _Optional[int] = ..., time: _Optional[float] = ..., tier: _Optional[str] = ..., cloud: _Optional[_Union[CloudStatus, _Mapping]] = ..., run: _Optional[_Union[RunStatus, _Mapping]] = ..., edges: _Optional[_Iterable[_Union[EdgeStatus, _Mapping]]] = ..., clients: _Optional[_Iterable[_Union[ClientStatus, _Mapping]]] = ..., totals: _Optional[_Union[Totals, _Mapping]] = ..., faults: _Optional[_Iterable[_Union[FaultNote, _Mapping]]] = ...) -> None: ...

class CloudStatus(_message.Message):
    __slots__ = ("name", "versions", "started", "superlink", "listen", "waiting")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    SUPERLINK_FIELD_NUMBER: _ClassVar[int]
    LISTEN_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    name: str
    versions: _containers.ScalarMap[str, str]
    started: float
    superlink: bool
    listen: str
    waiting: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ..., started: _Optional[float] = ..., superlink: _Optional[bool] = ..., listen: _Optional[str] = ..., waiting: _Optional[_Iterable[str]] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("run", "method", "status", "phase", "reason", "window", "windows", "round", "rounds", "losses", "seconds_left", "measures", "folder", "rounds_done")
    class MeasuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    MEASURES_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_DONE_FIELD_NUMBER: _ClassVar[int]
    run: str
    method: str
    status: str
    phase: str
    reason: str
    window: int
    windows: int
    round: int
    rounds: int
    losses: _containers.RepeatedScalarFieldContainer[float]
    seconds_left: float
    measures: _containers.ScalarMap[str, float]
    folder: str
    rounds_done: float
    def __init__(self, run: _Optional[str] = ..., method: _Optional[str] = ..., status: _Optional[str] = ..., phase: _Optional[str] = ..., reason: _Optional[str] = ..., window: _Optional[int] = ..., windows: _Optional[int] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., losses: _Optional[_Iterable[float]] = ..., seconds_left: _Optional[float] = ..., measures: _Optional[_Mapping[str, float]] = ..., folder: _Optional[str] = ..., rounds_done: _Optional[float] = ...) -> None: ...

class EdgeStatus(_message.Message):
    __slots__ = ("name", "connected", "versions", "window", "round", "training", "done", "loss", "up_bytes", "down_bytes", "faults", "last_seen", "clients")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    UP_BYTES_FIELD_NUMBER: _ClassVar[int]
    DOWN_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    connected: bool
    versions: _containers.ScalarMap[str, str]
    window: int
    round: int
    training: _containers.RepeatedScalarFieldContainer[str]
    done: _containers.RepeatedScalarFieldContainer[str]
    loss: float
    up_bytes: int
    down_bytes: int
    faults: int
    last_seen: float
    clients: int
    def __init__(self, name: _Optional[str] = ..., connected: _Optional[bool] = ..., versions: _Optional[_Mapping[str, str]] = ..., window: _Optional[int] = ..., round: _Optional[int] = ..., training: _Optional[_Iterable[str]] = ..., done: _Optional[_Iterable[str]] = ..., loss: _Optional[float] = ..., up_bytes: _Optional[int] = ..., down_bytes: _Optional[int] = ..., faults: _Optional[int] = ..., last_seen: _Optional[float] = ..., clients: _Optional[int] = ...) -> None: ...

class ClientStatus(_message.Message):
    __slots__ = ("name", "edges", "edge", "samples", "state", "last_seen", "steps_per_second", "loss", "device", "versions", "faults")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    edges: _containers.RepeatedScalarFieldContainer[str]
    edge: str
    samples: int
    state: str
    last_seen: float
    steps_per_second: float
    loss: float
    device: str
    versions: _containers.ScalarMap[str, str]
    faults: int
    def __init__(self, name: _Optional[str] = ..., edges: _Optional[_Iterable[str]] = ..., edge: _Optional[str] = ..., samples: _Optional[int] = ..., state: _Optional[str] = ..., last_seen: _Optional[float] = ..., steps_per_second: _Optional[float] = ..., loss: _Optional[float] = ..., device: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ..., faults: _Optional[int] = ...) -> None: ...

class LinkTotal(_message.Message):
    __slots__ = ("link", "up_bytes", "down_bytes", "messages")
    LINK_FIELD_NUMBER: _ClassVar[int]
    UP_BYTES_FIELD_NUMBER: _ClassVar[int]
    DOWN_BYTES_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    link: str
    up_bytes: int
    down_bytes: int
    messages: int
    def __init__(self, link: _Optional[str] = ..., up_bytes: _Optional[int] = ..., down_bytes: _Optional[int] = ..., messages: _Optional[int] = ...) -> None: ...

class FaultTotal(_message.Message):
    __slots__ = ("tier", "kind", "count")
    TIER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    tier: str
    kind: str
    count: int
    def __init__(self, tier: _Optional[str] = ..., kind: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class Totals(_message.Message):
    __slots__ = ("links", "faults", "rounds", "windows", "window_seconds", "last_window_seconds", "trainings", "training_seconds")
    LINKS_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LAST_WINDOW_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRAININGS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[LinkTotal]
    faults: _containers.RepeatedCompositeFieldContainer[FaultTotal]
    rounds: int
    windows: int
    window_seconds: float
    last_window_seconds: float
    trainings: int
    training_seconds: float
    def __init__(self, links: _Optional[_Iterable[_Union[LinkTotal, _Mapping]]] = ..., faults: _Optional[_Iterable[_Union[FaultTotal, _Mapping]]] = ..., rounds: _Optional[int] = ..., windows: _Optional[int] = ..., window_seconds: _Optional[float] = ..., last_window_seconds: _Optional[float] = ..., trainings: _Optional[int] = ..., training_seconds: _Optional[float] = ...) -> None: ...

class FaultNote(_message.Message):
    __slots__ = ("time", "tier", "node", "kind", "detail", "window", "round")
    TIME_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    time: float
    tier: str
    node: str
    kind: str
    detail: str
    window: int
    round: int
    def __init__(self, time: _Optional[float] = ..., tier: _Optional[str] = ..., node: _Optional[str] = ..., kind: _Optional[str] = ..., detail: _Optional[str] = ..., window: _Optional[int] = ..., round: _Optional[int] = ...) -> None: ...
