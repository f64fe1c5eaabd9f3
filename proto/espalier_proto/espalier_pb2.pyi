from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Version(_message.Message):
    __slots__ = ("window", "round")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    window: int
    round: int
    def __init__(self, window: _Optional[int] = ..., round: _Optional[int] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape", "buffer")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    BUFFER_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    buffer: bool
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., buffer: _Optional[bool] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ...) -> None: ...

class SectionName(_message.Message):
    __slots__ = ("name", "member")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    name: str
    member: str
    def __init__(self, name: _Optional[str] = ..., member: _Optional[str] = ...) -> None: ...

class Section(_message.Message):
    __slots__ = ("name", "member", "record", "layout")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    name: str
    member: str
    record: str
    layout: Layout
    def __init__(self, name: _Optional[str] = ..., member: _Optional[str] = ..., record: _Optional[str] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class ArchitectureSpec(_message.Message):
    __slots__ = ("family", "config", "tensors", "groups", "heads")
    class GroupsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class HeadsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    family: str
    config: _struct_pb2.Struct
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    groups: _containers.ScalarMap[str, int]
    heads: _containers.ScalarMap[str, int]
    def __init__(self, family: _Optional[str] = ..., config: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., groups: _Optional[_Mapping[str, int]] = ..., heads: _Optional[_Mapping[str, int]] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ("architecture", "returns", "sections", "sources")
    class SourcesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: SectionName
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[SectionName, _Mapping]] = ...) -> None: ...
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    RETURNS_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    architecture: ArchitectureSpec
    returns: _containers.RepeatedScalarFieldContainer[str]
    sections: _containers.RepeatedCompositeFieldContainer[Section]
    sources: _containers.MessageMap[str, SectionName]
    def __init__(self, architecture: _Optional[_Union[ArchitectureSpec, _Mapping]] = ..., returns: _Optional[_Iterable[str]] = ..., sections: _Optional[_Iterable[_Union[Section, _Mapping]]] = ..., sources: _Optional[_Mapping[str, SectionName]] = ...) -> None: ...

class LabelHistogram(_message.Message):
    __slots__ = ("counts", "noisy")
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    NOISY_FIELD_NUMBER: _ClassVar[int]
    counts: _containers.RepeatedScalarFieldContainer[float]
    noisy: bool
    def __init__(self, counts: _Optional[_Iterable[float]] = ..., noisy: _Optional[bool] = ...) -> None: ...

class ClassTable(_message.Message):
    __slots__ = ("schema", "kind", "classes", "dimension", "labels", "counts")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    schema: int
    kind: str
    classes: int
    dimension: int
    labels: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, schema: _Optional[int] = ..., kind: _Optional[str] = ..., classes: _Optional[int] = ..., dimension: _Optional[int] = ..., labels: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[float]] = ...) -> None: ...

class DeviceFacts(_message.Message):
    __slots__ = ("device", "cores", "memory_bytes", "versions", "speed")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    SPEED_FIELD_NUMBER: _ClassVar[int]
    device: str
    cores: int
    memory_bytes: int
    versions: _containers.ScalarMap[str, str]
    speed: float
    def __init__(self, device: _Optional[str] = ..., cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., versions: _Optional[_Mapping[str, str]] = ..., speed: _Optional[float] = ...) -> None: ...

class ClientHello(_message.Message):
    __slots__ = ("schema", "name", "samples", "histogram", "facts", "image_shape", "classes", "data", "level", "model", "link_seconds", "public_key", "homes")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    HISTOGRAM_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SHAPE_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LINK_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    HOMES_FIELD_NUMBER: _ClassVar[int]
    schema: int
    name: str
    samples: int
    histogram: LabelHistogram
    facts: DeviceFacts
    image_shape: _containers.RepeatedScalarFieldContainer[int]
    classes: _containers.RepeatedScalarFieldContainer[str]
    data: str
    level: float
    model: str
    link_seconds: float
    public_key: bytes
    homes: int
    def __init__(self, schema: _Optional[int] = ..., name: _Optional[str] = ..., samples: _Optional[int] = ..., histogram: _Optional[_Union[LabelHistogram, _Mapping]] = ..., facts: _Optional[_Union[DeviceFacts, _Mapping]] = ..., image_shape: _Optional[_Iterable[int]] = ..., classes: _Optional[_Iterable[str]] = ..., data: _Optional[str] = ..., level: _Optional[float] = ..., model: _Optional[str] = ..., link_seconds: _Optional[float] = ..., public_key: _Optional[bytes] = ..., homes: _Optional[int] = ...) -> None: ...

class EdgeHello(_message.Message):
    __slots__ = ("schema", "name", "clients", "busy_with", "facts", "faults")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    BUSY_WITH_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    schema: int
    name: str
    clients: _containers.RepeatedCompositeFieldContainer[ClientHello]
    busy_with: str
    facts: DeviceFacts
    faults: _containers.RepeatedCompositeFieldContainer[Fault]
    def __init__(self, schema: _Optional[int] = ..., name: _Optional[str] = ..., clients: _Optional[_Iterable[_Union[ClientHello, _Mapping]]] = ..., busy_with: _Optional[str] = ..., facts: _Optional[_Union[DeviceFacts, _Mapping]] = ..., faults: _Optional[_Iterable[_Union[Fault, _Mapping]]] = ...) -> None: ...

class Participant(_message.Message):
    __slots__ = ("client", "edge", "start", "view")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    client: str
    edge: str
    start: Version
    view: str
    def __init__(self, client: _Optional[str] = ..., edge: _Optional[str] = ..., start: _Optional[_Union[Version, _Mapping]] = ..., view: _Optional[str] = ...) -> None: ...

class RoundSchedule(_message.Message):
    __slots__ = ("round", "participants", "keep")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    round: int
    participants: _containers.RepeatedCompositeFieldContainer[Participant]
    keep: int
    def __init__(self, round: _Optional[int] = ..., participants: _Optional[_Iterable[_Union[Participant, _Mapping]]] = ..., keep: _Optional[int] = ...) -> None: ...

class WindowPlan(_message.Message):
    __slots__ = ("schema", "run", "window", "rounds", "settings", "architecture", "sections", "checkpoint_window", "round_deadline", "quorum", "views", "population", "inquiry", "peers", "nonce")
    class ViewsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: View
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[View, _Mapping]] = ...) -> None: ...
    class PeersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ArchitectureSpec
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ArchitectureSpec, _Mapping]] = ...) -> None: ...
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROUND_DEADLINE_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    INQUIRY_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    schema: int
    run: str
    window: int
    rounds: _containers.RepeatedCompositeFieldContainer[RoundSchedule]
    settings: _struct_pb2.Struct
    architecture: ArchitectureSpec
    sections: _containers.RepeatedCompositeFieldContainer[Section]
    checkpoint_window: int
    round_deadline: float
    quorum: int
    views: _containers.MessageMap[str, View]
    population: int
    inquiry: str
    peers: _containers.MessageMap[str, ArchitectureSpec]
    nonce: bytes
    def __init__(self, schema: _Optional[int] = ..., run: _Optional[str] = ..., window: _Optional[int] = ..., rounds: _Optional[_Iterable[_Union[RoundSchedule, _Mapping]]] = ..., settings: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., architecture: _Optional[_Union[ArchitectureSpec, _Mapping]] = ..., sections: _Optional[_Iterable[_Union[Section, _Mapping]]] = ..., checkpoint_window: _Optional[int] = ..., round_deadline: _Optional[float] = ..., quorum: _Optional[int] = ..., views: _Optional[_Mapping[str, View]] = ..., population: _Optional[int] = ..., inquiry: _Optional[str] = ..., peers: _Optional[_Mapping[str, ArchitectureSpec]] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class RoundPlan(_message.Message):
    __slots__ = ("schema", "run", "window", "round", "client", "edge", "start", "checkpoint_window", "settings", "architecture", "sections", "population", "returns", "inquiry", "peers", "nonce")
    class PeersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ArchitectureSpec
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ArchitectureSpec, _Mapping]] = ...) -> None: ...
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_WINDOW_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    RETURNS_FIELD_NUMBER: _ClassVar[int]
    INQUIRY_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    schema: int
    run: str
    window: int
    round: int
    client: str
    edge: str
    start: Version
    checkpoint_window: int
    settings: _struct_pb2.Struct
    architecture: ArchitectureSpec
    sections: _containers.RepeatedCompositeFieldContainer[Section]
    population: int
    returns: _containers.RepeatedScalarFieldContainer[str]
    inquiry: str
    peers: _containers.MessageMap[str, ArchitectureSpec]
    nonce: bytes
    def __init__(self, schema: _Optional[int] = ..., run: _Optional[str] = ..., window: _Optional[int] = ..., round: _Optional[int] = ..., client: _Optional[str] = ..., edge: _Optional[str] = ..., start: _Optional[_Union[Version, _Mapping]] = ..., checkpoint_window: _Optional[int] = ..., settings: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., architecture: _Optional[_Union[ArchitectureSpec, _Mapping]] = ..., sections: _Optional[_Iterable[_Union[Section, _Mapping]]] = ..., population: _Optional[int] = ..., returns: _Optional[_Iterable[str]] = ..., inquiry: _Optional[str] = ..., peers: _Optional[_Mapping[str, ArchitectureSpec]] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class UpdateStatement(_message.Message):
    __slots__ = ("schema", "run", "window", "round", "client", "edge", "inquiry", "nonce", "samples", "architecture", "payload", "form", "report")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    INQUIRY_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    schema: int
    run: str
    window: int
    round: int
    client: str
    edge: str
    inquiry: str
    nonce: bytes
    samples: int
    architecture: bytes
    payload: bytes
    form: bytes
    report: bytes
    def __init__(self, schema: _Optional[int] = ..., run: _Optional[str] = ..., window: _Optional[int] = ..., round: _Optional[int] = ..., client: _Optional[str] = ..., edge: _Optional[str] = ..., inquiry: _Optional[str] = ..., nonce: _Optional[bytes] = ..., samples: _Optional[int] = ..., architecture: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., form: _Optional[bytes] = ..., report: _Optional[bytes] = ...) -> None: ...

class SignedStatement(_message.Message):
    __slots__ = ("statement", "signature")
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    statement: bytes
    signature: bytes
    def __init__(self, statement: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class ClientReport(_message.Message):
    __slots__ = ("schema", "run", "window", "round", "client", "samples", "steps", "loss", "seconds", "up_bytes", "sections", "metrics", "table", "architecture", "signed", "cpu_seconds")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    UP_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    schema: int
    run: str
    window: int
    round: int
    client: str
    samples: int
    steps: int
    loss: float
    seconds: float
    up_bytes: int
    sections: _containers.RepeatedCompositeFieldContainer[Section]
    metrics: _containers.ScalarMap[str, float]
    table: ClassTable
    architecture: ArchitectureSpec
    signed: SignedStatement
    cpu_seconds: float
    def __init__(self, schema: _Optional[int] = ..., run: _Optional[str] = ..., window: _Optional[int] = ..., round: _Optional[int] = ..., client: _Optional[str] = ..., samples: _Optional[int] = ..., steps: _Optional[int] = ..., loss: _Optional[float] = ..., seconds: _Optional[float] = ..., up_bytes: _Optional[int] = ..., sections: _Optional[_Iterable[_Union[Section, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., table: _Optional[_Union[ClassTable, _Mapping]] = ..., architecture: _Optional[_Union[ArchitectureSpec, _Mapping]] = ..., signed: _Optional[_Union[SignedStatement, _Mapping]] = ..., cpu_seconds: _Optional[float] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("tier", "node", "kind", "detail", "window", "round")
    TIER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    tier: str
    node: str
    kind: str
    detail: str
    window: int
    round: int
    def __init__(self, tier: _Optional[str] = ..., node: _Optional[str] = ..., kind: _Optional[str] = ..., detail: _Optional[str] = ..., window: _Optional[int] = ..., round: _Optional[int] = ...) -> None: ...

class LinkBytes(_message.Message):
    __slots__ = ("up_bytes", "down_bytes", "messages")
    UP_BYTES_FIELD_NUMBER: _ClassVar[int]
    DOWN_BYTES_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    up_bytes: int
    down_bytes: int
    messages: int
    def __init__(self, up_bytes: _Optional[int] = ..., down_bytes: _Optional[int] = ..., messages: _Optional[int] = ...) -> None: ...

class RoundRecord(_message.Message):
    __slots__ = ("round", "clients", "seconds", "loss")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    round: int
    clients: _containers.RepeatedCompositeFieldContainer[ClientReport]
    seconds: float
    loss: float
    def __init__(self, round: _Optional[int] = ..., clients: _Optional[_Iterable[_Union[ClientReport, _Mapping]]] = ..., seconds: _Optional[float] = ..., loss: _Optional[float] = ...) -> None: ...

class EdgeReport(_message.Message):
    __slots__ = ("schema", "run", "window", "edge", "samples", "last_round_samples", "labels", "rounds", "client_edge", "up_bytes", "faults", "sections", "metrics", "seconds", "roster", "peers", "signatures")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class PeersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ArchitectureSpec
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ArchitectureSpec, _Mapping]] = ...) -> None: ...
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_EDGE_FIELD_NUMBER: _ClassVar[int]
    UP_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    schema: int
    run: str
    window: int
    edge: str
    samples: int
    last_round_samples: int
    labels: LabelHistogram
    rounds: _containers.RepeatedCompositeFieldContainer[RoundRecord]
    client_edge: LinkBytes
    up_bytes: int
    faults: _containers.RepeatedCompositeFieldContainer[Fault]
    sections: _containers.RepeatedCompositeFieldContainer[Section]
    metrics: _containers.ScalarMap[str, float]
    seconds: float
    roster: EdgeHello
    peers: _containers.MessageMap[str, ArchitectureSpec]
    signatures: int
    def __init__(self, schema: _Optional[int] = ..., run: _Optional[str] = ..., window: _Optional[int] = ..., edge: _Optional[str] = ..., samples: _Optional[int] = ..., last_round_samples: _Optional[int] = ..., labels: _Optional[_Union[LabelHistogram, _Mapping]] = ..., rounds: _Optional[_Iterable[_Union[RoundRecord, _Mapping]]] = ..., client_edge: _Optional[_Union[LinkBytes, _Mapping]] = ..., up_bytes: _Optional[int] = ..., faults: _Optional[_Iterable[_Union[Fault, _Mapping]]] = ..., sections: _Optional[_Iterable[_Union[Section, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., seconds: _Optional[float] = ..., roster: _Optional[_Union[EdgeHello, _Mapping]] = ..., peers: _Optional[_Mapping[str, ArchitectureSpec]] = ..., signatures: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("schema", "run", "edge", "window", "round", "training", "done", "loss", "client_edge")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_EDGE_FIELD_NUMBER: _ClassVar[int]
    schema: int
    run: str
    edge: str
    window: int
    round: int
    training: _containers.RepeatedScalarFieldContainer[str]
    done: _containers.RepeatedScalarFieldContainer[str]
    loss: float
    client_edge: LinkBytes
    def __init__(self, schema: _Optional[int] = ..., run: _Optional[str] = ..., edge: _Optional[str] = ..., window: _Optional[int] = ..., round: _Optional[int] = ..., training: _Optional[_Iterable[str]] = ..., done: _Optional[_Iterable[str]] = ..., loss: _Optional[float] = ..., client_edge: _Optional[_Union[LinkBytes, _Mapping]] = ...) -> None: ...
