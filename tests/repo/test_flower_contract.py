"""What the adapters use of Flower's internals: an upgrade of Flower that changes it fails here first."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flwr
import pytest
from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.app.metadata import Metadata
from flwr.common import config, constant, serde
from flwr.proto import fleet_pb2, fleet_pb2_grpc, message_pb2, runtime_pb2
from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import NodeAuthServerInterceptor
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.serverapp import Grid
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.grid.http_grid import HttpGrid

SIGNATURES: list[tuple[Callable[..., Any], str]] = [
    (InMemoryLinkState.store_message_ins, "self message"),
    (InMemoryLinkState.delete_messages, "self message_ins_ids"),
    (InMemoryLinkState.create_node, "self owner_aid owner_name public_key heartbeat_interval location name"),
    (InMemoryLinkState.delete_node, "self owner_aid node_id"),
    (InMemoryLinkState.get_node_info, "self node_ids owner_aids statuses"),
    (InMemoryLinkState.get_node_id_by_public_key, "self public_key"),
    (InMemoryLinkState.claim_task, "self task_id"),
    (InMemoryLinkState.activate_task, "self task_id"),
    (InMemoryLinkState.finish_task, "self task_id sub_status details"),
    (InMemoryLinkState.cleanup_run, "self run_id"),
    (InMemoryLinkState.store_fab, "self fab"),
    (InMemoryLinkState._cleanup_push_session, "self session_id cleanup_messages"),
    (InMemoryObjectStore.preregister, "self run_id object_tree"),
    (InMemoryObjectStore.put, "self object_id object_content"),
    (InMemoryObjectStore.get, "self object_id"),
    (InMemoryObjectStore.delete, "self object_id"),
    (InMemoryObjectStore.get_object_tree, "self object_id"),
    (LinkStateFactory.__init__, "self database federation_manager objectstore_factory"),
    (FleetServicer.__init__, "self state_factory objectstore_factory enable_supernode_auth"),
    (FleetServicer.PullMessages, "self request context"),
    (FleetServicer.PushMessages, "self request context"),
    (FleetServicer.PushObject, "self request context"),
    (FleetServicer.ConfirmMessageReceived, "self request context"),
    (FleetServicer.RegisterNode, "self request context"),
    (FleetServicer.ActivateNode, "self request context"),
    (FleetServicer.DeactivateNode, "self request context"),
    (NodeAuthServerInterceptor.__init__, "self state_factory"),
    (HttpGrid.push_messages, "self messages"),
    (HttpGrid.__init__, "self runtime_api_address insecure root_certificates token"),
    (Grid.send_and_receive, "self messages timeout"),
    (config.get_fused_config_from_fab, "fab_file run"),
    (config.get_fab_config, "fab_file"),
    (config.get_metadata_from_config, "config"),
    (serde.message_to_proto, "message"),
    (serde.message_from_proto, "message_proto"),
    (serde.recorddict_to_proto, "recorddict"),
    (inflatable_object.get_object_head_values_from_object_content, "object_content"),
]


def names(function: Callable[..., Any]) -> str:
    return " ".join(inspect.signature(function).parameters)


def test_the_pinned_version() -> None:
    assert flwr.__version__.startswith("1.39.")


@pytest.mark.parametrize(
    ("function", "parameters"), SIGNATURES, ids=lambda value: getattr(value, "__qualname__", "")
)
def test_signatures(function: Callable[..., Any], parameters: str) -> None:
    assert names(function) == parameters


def test_create_run_takes_what_the_inline_server_gives() -> None:
    assert names(InMemoryLinkState.create_run).split()[:9] == [
        "self",
        "fab_id",
        "fab_version",
        "fab_hash",
        "override_config",
        "federation_id",
        "federation_config",
        "flwr_aid",
        "primary_task_type",
    ]


def test_attributes_of_state_and_store() -> None:
    stores = ObjectStoreFactory(":flwr-in-memory:")
    state = LinkStateFactory(":flwr-in-memory:", NoOpFederationManager(), stores).state()
    assert type(state) is InMemoryLinkState
    assert type(stores.store()) is InMemoryObjectStore
    for name in (
        "lock",
        "nodes",
        "node_public_key_to_node_id",
        "message_ins_store",
        "message_res_store",
        "message_ins_id_to_message_res_id",
        "lock_task_store",
        "task_token_store",
        "task_token_to_task_id",
        "_object_push_sessions",
    ):
        assert hasattr(state, name), name


def test_methods_of_the_fleet_service() -> None:
    methods = {name for name in vars(fleet_pb2_grpc.FleetServicer) if name[0].isupper()}
    assert methods == {
        "RegisterNode",
        "ActivateNode",
        "DeactivateNode",
        "UnregisterNode",
        "SendNodeHeartbeat",
        "PullMessages",
        "PushMessages",
        "GetRun",
        "GetFab",
        "PushObject",
        "PullObject",
        "ConfirmMessageReceived",
    }


def fields(message: Any) -> set[str]:
    return {field.name for field in message.DESCRIPTOR.fields}


def test_fields_on_the_wire() -> None:
    assert {"messages_list", "message_object_trees"} <= fields(fleet_pb2.PullMessagesResponse)
    assert {"objects_to_push", "session_id"} <= fields(fleet_pb2.PushMessagesResponse)
    assert {"node", "object_id", "object_content", "session_id", "run_id"} <= fields(
        message_pb2.PushObjectRequest
    )
    assert {"object_found", "object_available", "object_content"} == fields(message_pb2.PullObjectResponse)
    assert {"object_id", "children"} == fields(message_pb2.ObjectTree)
    assert {"messages_list", "message_object_trees"} == fields(runtime_pb2.PullAppMessagesResponse)


def test_constants() -> None:
    assert constant.HEARTBEAT_MIN_INTERVAL == 10
    assert constant.HEARTBEAT_PATIENCE == 2
    assert constant.SUPERLINK_NODE_ID == 1
    assert constant.PUBLIC_KEY_HEADER == "flwr-public-key-bin"
    assert constant.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE == 5 * 1024 * 1024
    assert int(ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED) == 2001
    assert int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED) == 2004
    assert int(ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED) == 2007
    assert int(ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE) == 23


def test_classes_of_objects() -> None:
    assert set(inflatable_utils.inflatable_class_registry) == {
        "ArrayChunk",
        "Array",
        "ArrayRecord",
        "ConfigRecord",
        "Message",
        "MetricRecord",
        "RecordDict",
    }


def test_private_metadata_that_is_stamped() -> None:
    metadata = Metadata(1, "", 1, 2, "", "", 1.0, 1.0, "train")
    assert {"_run_id", "_message_id", "_src_node_id", "_src_task_id", "_reply_to_message_id"} <= set(
        vars(metadata)
    )
    assert {"task_id", "run_id", "node_id"} <= set(dir(type(TaskIdentity)))
    assert hasattr(HttpGrid, "_runtime_client")


def test_arrays_keep_their_chunks_where_they_are_filled_in() -> None:
    array = Array("uint8", (3,), "numpy.ndarray", b"abc")
    array.__dict__["_chunks"] = [("0" * 64, ArrayChunk(memoryview(b"abc")))]
    assert list(array.children) == ["0" * 64]
