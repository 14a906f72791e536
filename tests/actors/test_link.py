"""Sockets of an engine: private files on one node, keys over TCP."""

import os
import signal
import subprocess
import sys

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from flyray.actors.link import LinkError, LinkKeys, LinkPlace, Links

# Nothing here takes so long unless it hangs.
WAIT_MS = 60_000


def exchange_text(server: Links, client: Links, place: LinkPlace) -> str:
    """Sends a text and its answer between two processes' links."""
    bound, address = server.bind(zmq.ROUTER, place, "plan")
    connected = client.connect(zmq.DEALER, address, identity=b"me")
    connected.send(b"hello")
    assert bound.poll(WAIT_MS), "nothing arrived"
    bound.send_multipart(bound.recv_multipart())
    assert connected.poll(WAIT_MS), "nothing came back"
    assert connected.recv() == b"hello"
    return address


def test_unix_sockets_stand_in_the_folder(socket_folder: str) -> None:
    server, client = Links(None), Links(None)
    try:
        assert exchange_text(server, client, LinkPlace(folder=socket_folder)) == f"ipc://{socket_folder}/plan"
        assert os.listdir(socket_folder) == ["plan"]
    finally:
        server.close()
        client.close()


def test_tcp_with_keys_reaches_a_member() -> None:
    keys = LinkKeys.create()
    silence_s = WAIT_MS / 1000  # shorter, and a machine that stands still meanwhile would lose the message
    server, client = Links(keys, silence_s), Links(keys.for_client(), silence_s)
    try:
        address = exchange_text(server, client, LinkPlace(host="127.0.0.1"))
        assert address.startswith("tcp://127.0.0.1:")
    finally:
        server.close()
        client.close()


@pytest.mark.parametrize("keys", ["another engine's", "another client's", "none"])
def test_tcp_refuses_strangers(keys: str) -> None:
    own = LinkKeys.create()
    other = LinkKeys.create()
    mixed = LinkKeys(own.server_public, other.client_public, other.client_secret)
    strange = {"another engine's": other.for_client(), "another client's": mixed, "none": None}[keys]
    server, stranger, member = Links(own), Links(strange), Links(own.for_client())
    try:
        bound, address = server.bind(zmq.ROUTER, LinkPlace(host="127.0.0.1"), "plan")
        failures = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        failures |= zmq.EVENT_HANDSHAKE_FAILED_AUTH
        # It listens before the stranger connects: one refused for speaking another protocol does not come again.
        monitor = bound.get_monitor_socket(failures | zmq.EVENT_DISCONNECTED)
        refused = stranger.connect(zmq.DEALER, address)
        refused.send(b"let me in")
        assert monitor.poll(WAIT_MS), "the stranger was neither refused nor dropped"
        welcome = member.connect(zmq.DEALER, address)
        welcome.send(b"mine")
        assert bound.poll(WAIT_MS)
        assert bound.recv_multipart()[1] == b"mine"
        assert not bound.poll(0), "the stranger's message came through"
        bound.disable_monitor()
    finally:
        for links in (server, stranger, member):
            links.close()


def test_a_clients_keys_cannot_bind() -> None:
    links = Links(LinkKeys.create().for_client())
    try:
        with pytest.raises(LinkError, match="can connect but not bind"):
            links.bind(zmq.ROUTER, LinkPlace(host="127.0.0.1"), "plan")
    finally:
        links.close()


def test_secrets_are_not_printed() -> None:
    keys = LinkKeys.create()
    assert keys.client_secret.decode() not in repr(keys)
    assert keys.server_secret.decode() not in repr(keys)
    assert keys.for_client().server_secret == b""


PEER = """
import sys
from flyray.actors.link import Links
import zmq
Links(None).connect(zmq.DEALER, sys.argv[1]).recv()
"""


@pytest.mark.parametrize(
    ("transport", "sent"), [("tcp", signal.SIGSTOP), ("tcp", signal.SIGKILL), ("ipc", signal.SIGKILL)]
)
def test_a_peer_that_stops_or_dies_is_noticed(transport: str, sent: signal.Signals, socket_folder: str) -> None:
    server = Links(None, silence_s=0.3)
    place = LinkPlace(folder=socket_folder) if transport == "ipc" else LinkPlace(host="127.0.0.1")
    bound, address = server.bind(zmq.DEALER, place, "plan")
    monitor = bound.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    peer = subprocess.Popen([sys.executable, "-c", PEER, address])
    try:
        assert monitor.poll(WAIT_MS), "the peer did not come up"
        assert recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        peer.send_signal(sent)
        assert monitor.poll(WAIT_MS), "the peer is still taken for alive"
        assert recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
        bound.disable_monitor()
    finally:
        peer.kill()
        peer.wait()
        server.close()


def test_a_place_is_one_of_two_and_a_bad_one_is_named() -> None:
    with pytest.raises(ValueError, match="a folder or a host"):
        LinkPlace()
    links = Links(None)
    try:
        with pytest.raises(LinkError, match="ipc:///does/not/exist/plan: cannot bind"):
            links.bind(zmq.ROUTER, LinkPlace(folder="/does/not/exist"), "plan")
    finally:
        links.close()
