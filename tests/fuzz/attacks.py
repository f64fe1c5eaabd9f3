"""What an attacker throws at a port: raw mutated requests, junk frames, TLS and HTTP where neither is."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import Counter
from random import Random
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.node_pb2 import Node
from google.protobuf.message import Message as Proto

from espalier.flower.inline_objects import attach
from espalier_proto import monitor_pb2 as mpb
from tests.fuzz.mutate import mutate_bytes, mutate_proto

#: Seconds in which a port has to answer, or hang up.
LONGEST = 3.0

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FLEET = "/flwr.proto.Fleet/"


def requests() -> list[tuple[str, Proto]]:
    """Return a plausible request for every method of the Fleet service."""
    node = Node(node_id=1234567)
    message = message_pb2.Message(
        metadata=message_pb2.Metadata(
            run_id=1, message_id="a" * 64, src_node_id=1234567, dst_node_id=1, reply_to_message_id="b" * 64
        )
    )
    attach(message, [b"Message||4\x00none", bytes(200)])
    tree = message_pb2.ObjectTree(object_id="a" * 64, children=[message_pb2.ObjectTree(object_id="c" * 64)])
    push = fleet_pb2.PushMessagesRequest(node=node, messages_list=[message], message_object_trees=[tree])
    return [
        (FLEET + "RegisterNode", fleet_pb2.RegisterNodeFleetRequest(public_key=b"no key")),
        (FLEET + "ActivateNode", fleet_pb2.ActivateNodeRequest(public_key=b"no key", heartbeat_interval=30)),
        (FLEET + "DeactivateNode", fleet_pb2.DeactivateNodeRequest(node_id=1234567)),
        (FLEET + "UnregisterNode", fleet_pb2.UnregisterNodeFleetRequest(node_id=1234567)),
        (
            FLEET + "SendNodeHeartbeat",
            heartbeat_pb2.SendNodeHeartbeatRequest(node=node, heartbeat_interval=30),
        ),
        (FLEET + "PullMessages", fleet_pb2.PullMessagesRequest(node=node)),
        (FLEET + "PushMessages", push),
        (FLEET + "GetRun", run_pb2.GetRunRequest(node=node, run_id=1)),
        (FLEET + "GetFab", GetFabRequest(node=node, hash_str="d" * 64, run_id=1)),
        (
            FLEET + "PushObject",
            message_pb2.PushObjectRequest(node=node, run_id=1, object_id="c" * 64, object_content=b"x" * 64),
        ),
        (FLEET + "PullObject", message_pb2.PullObjectRequest(node=node, run_id=1, object_id="c" * 64)),
        (
            FLEET + "ConfirmMessageReceived",
            message_pb2.ConfirmMessageReceivedRequest(node=node, run_id=1, message_object_id="a" * 64),
        ),
    ]


def monitor_requests() -> list[tuple[str, Proto]]:
    """Return a request for every method of the Monitor service."""
    service = "/espalier.monitor.v1.Monitor/"
    return [
        (service + "GetStatus", mpb.StatusRequest()),
        (service + "Watch", mpb.WatchRequest(interval=-1.0)),
        ("/grpc.health.v1.Health/Check", mpb.StatusRequest()),
    ]


class Attacker:
    """Throws things at a port and counts what comes back.

    Parameters
    ----------
    address : str
        HOST:PORT.
    examples : list of (str, Message)
        Methods and requests that mutants are made of.
    """

    def __init__(self, address: str, examples: list[tuple[str, Proto]]) -> None:
        self._address, self._examples = address, examples
        self._plain = grpc.insecure_channel(address)
        key = ec.generate_private_key(ec.SECP384R1())
        self._signed = grpc.intercept_channel(self._plain, NodeAuthClientInterceptor(key, key.public_key()))
        self.answers: Counter[str] = Counter()
        self.slowest = 0.0

    def close(self) -> None:
        self._plain.close()

    def throw(self, rng: Random) -> None:
        """Throw one thing."""
        start = time.monotonic()
        if rng.random() < 0.75:
            self._call(rng)
        else:
            self._junk(rng)
        self.slowest = max(self.slowest, time.monotonic() - start)

    def _call(self, rng: Random) -> None:
        method, request = rng.choice(self._examples)
        data = request.SerializeToString()
        if rng.random() < 0.5:
            data = mutate_bytes(data, rng)
        elif request.DESCRIPTOR.fields:
            data = mutate_proto(request, rng).SerializeToString()
        if rng.random() < 0.1:
            method = rng.choice((method + "x", "/nobody/Knows", "/", "/flwr.proto.Control/StartRun"))
        channel = self._signed if rng.random() < 0.6 else self._plain
        options: dict[str, Any] = {"request_serializer": bytes, "response_deserializer": bytes}
        try:
            if method.endswith("/Watch"):  # goes on until the caller hangs up
                stream: Any = self._plain.unary_stream(method, **options)(data, timeout=LONGEST)
                answer = next(stream)
                stream.cancel()
            else:
                call: Any = channel.unary_unary(method, **options)
                answer = call(data, timeout=LONGEST)
        except grpc.RpcError as error:
            self.answers[f"refused {error.code().name}"] += 1
        except ValueError as error:  # a method name that gRPC does not send
            self.answers[f"not sent {type(error).__name__}"] += 1
        else:
            self.answers["answered " + ("empty" if not answer else method.rpartition("/")[2])] += 1

    def _junk(self, rng: Random) -> None:
        host, _, port = self._address.rpartition(":")
        frame = rng.choice((0, 1, 3, 4, 5, 6, 7, 8, 9, 200))
        size = rng.choice((0, 1, 8, 16384, 2**24 - 1))
        junk = rng.choice(
            (
                rng.randbytes(rng.randrange(1, 400)),
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
                + rng.randbytes(200),  # a TLS ClientHello's head
                PREFACE + rng.randbytes(rng.randrange(1, 400)),
                PREFACE
                + b"\0\0\0\x04\0\0\0\0\0"
                + size.to_bytes(3, "big")
                + bytes([frame, rng.randrange(256)])
                + rng.randbytes(4 + rng.randrange(200)),
                mutate_bytes(PREFACE + b"\0\0\0\x04\0\0\0\0\0", rng),
            )
        )
        try:
            with socket.create_connection((host, int(port)), timeout=LONGEST) as connection:
                connection.sendall(junk)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
            self.answers["hung up"] += 1
        except TimeoutError:
            self.answers["no end"] += 1
        except OSError as error:
            self.answers[f"cut {type(error).__name__}"] += 1
