"""A check at the start for the names in waitress that `channel`, `parser` and `server` rely on.

They override methods and use attributes that waitress does not document. If one were missing, most
of the proxy would still run, but an override would no longer be called, or a lock would no longer
be the one that waitress takes. So a waitress that lacks one is rejected before anything listens.
"""

from __future__ import annotations

import socket
from importlib.metadata import version

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

SUITABLE = ">= 3.0.1, < 4"  # as in setup.cfg

_CONNECTION = """
    parser_class task_class error_task_class server adj socket addr connected
    request requests requests_lock last_activity _fileno will_close close_when_flushed
    outbufs outbuf_lock total_outbufs_len current_outbuf_count
    readable writable received service handle_read handle_write handle_close send_continue
    write_soon _flush_exception _flush_some _flush_some_if_lockable
"""
_RESPONSE = """
    channel request version status response_headers complete has_body wrote_header
    chunked_response content_length content_bytes_written close_on_finish
    service execute build_response_header write finish set_close_on_finish
"""
_REQUEST = """
    adj headers version error completed empty expect_continue headers_finished connection_close
    chunked content_length body_rcv body_bytes_received
    received parse_header get_body_stream close
"""
_LISTENER = """
    adj socket accepting channel_class active_channels _map _fileno
    readable writable handle_accept set_socket_options add_task pull_trigger
"""


class UnsuitableWaitress(Exception):
    """The installed waitress lacks a required name; the message is the sentence for the user."""


def require_suitable() -> None:
    """Look for every name on real objects of waitress, since some are set by their constructors.

    Raises:
        UnsuitableWaitress: a name is missing.
    """
    sockets: dict[int, object] = {}
    listening, (ours, theirs) = socket.socket(), socket.socketpair()
    adjustments = Adjustments(sockets=[])
    try:
        listener = TcpWSGIServer(
            None,
            sockets,
            _start=False,
            _sock=listening,
            dispatcher=ThreadedTaskDispatcher(),
            adj=adjustments,
            bind_socket=False,
            sockinfo=(listening.family, listening.type, listening.proto, ("127.0.0.1", 0)),
        )
        connection = HTTPChannel(listener, ours, ("127.0.0.1", 0), adjustments, map=sockets)
        request = HTTPRequestParser(adjustments)
        for it, names in (
            (listener, _LISTENER),
            (connection, _CONNECTION),
            (request, _REQUEST),
            (WSGITask(connection, request), f"{_RESPONSE} get_environment"),
            (ErrorTask(connection, request), _RESPONSE),
        ):
            for name in names.split():
                if not hasattr(it, name):
                    raise UnsuitableWaitress(
                        f"waitress {version('waitress')} does not suit mlxproxy: its "
                        f"{type(it).__name__} has no {name}. Install one that does: "
                        f"`pip install 'waitress {SUITABLE}'`."
                    )
    finally:
        theirs.close()
        wasyncore.close_all(sockets, ignore_all=True)
