"""One exception type per error code of the HTTP contract, and the only code that renders them.

Nothing here depends on Flask: the controller, the catalogue and the relay raise these errors, the
blueprints turn them into a response, and a stream that has begun carries one as its last event.
"""

from __future__ import annotations

from typing import Any


class ProxyError(Exception):
    """An error for a client, in the shape of OpenAI's API.

    Args:
        message: a sentence that says what is wrong and what to do next.
        param: the name of the request field at fault, if there is one.
        retry_after: seconds after which a retry makes sense (sent as ``Retry-After``).
        details: additional fields of the error object.
    """

    status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.details = details

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the contract: ``{"error": {message, type, param, code}}``."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            **self.details,
        }
        return {"error": error}


class _ClientError(ProxyError):
    status = 400
    type = "invalid_request_error"


class InvalidJSON(_ClientError):
    code = "invalid_json"


class InvalidRequest(_ClientError):
    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """The prompt is too long; clients shorten it when they see OpenAI's code for that."""

    code = "context_length_exceeded"

    @classmethod
    def of(cls, prompt: str, context: int, param: str | None = None) -> ContextLengthExceeded:
        """Return the error with the wording by which clients recognise it.

        Args:
            prompt: its length in words: "12 tokens", "about 100 tokens".
            context: the number of tokens that the model accepts.
            param: the request field that contains the prompt.
        """
        return cls(
            f"This model's maximum context length is {context} tokens, but the prompt has "
            f"{prompt}. Send less.",
            param=param,
        )


class InvalidApiKey(_ClientError):
    status = 401
    code = "invalid_api_key"


class OriginNotAllowed(_ClientError):
    status = 403
    code = "origin_not_allowed"


class HostNotAllowed(_ClientError):
    status = 403
    code = "host_not_allowed"


class NotFound(_ClientError):
    status = 404
    code = "not_found"


class ModelNotFound(_ClientError):
    status = 404
    code = "model_not_found"


class MethodNotAllowed(_ClientError):
    status = 405
    code = "method_not_allowed"


class AmbiguousModel(_ClientError):
    status = 409
    code = "ambiguous_model"


class LoadCancelled(ProxyError):
    status = 409
    code = "load_cancelled"


class AnswerEnded(ProxyError):
    """Somebody has ended the answer. No client library retries a request with this status."""

    status = 410
    code = "answer_ended"


class RequestTooLarge(_ClientError):
    status = 413
    code = "request_too_large"


class ModelUnusable(_ClientError):
    status = 422
    code = "model_unusable"


class TooManyRequests(ProxyError):
    status = 429
    code = "too_many_requests"
    type = "rate_limit_error"


class InternalError(ProxyError):
    """An error that should not happen: the details are in the log, never in the response."""


class LoadFailed(ProxyError):
    status = 500
    code = "load_failed"


class BackendFailed(ProxyError):
    status = 502
    code = "backend_failed"


class PeerUnavailable(ProxyError):
    """Another machine that has the model does not answer, or has ended the answer."""

    status = 502
    code = "peer_unavailable"


class PeerLoop(ProxyError):
    """A request that comes from a peer would have to go to a peer."""

    status = 508
    code = "peer_loop"


class NoModelLoaded(ProxyError):
    status = 503
    code = "no_model_loaded"


class ModelsRootUnavailable(ProxyError):
    status = 503
    code = "models_root_unavailable"


class ModelSwapped(ProxyError):
    """The answer was aborted because another model was requested and the drain took too long."""

    status = 503
    code = "model_swapped"


class ModelUnloaded(ProxyError):
    """The answer was aborted because an unload was requested and the drain took too long."""

    status = 503
    code = "model_unloaded"


class PortInUse(ProxyError):
    """A process that this program didn't start holds the backend's port."""

    status = 503
    code = "port_in_use"


class ShuttingDown(ProxyError):
    status = 503
    code = "shutting_down"


class LoadTimeout(ProxyError):
    status = 504
    code = "load_timeout"


class BackendTimeout(ProxyError):
    status = 504
    code = "backend_timeout"


class InsufficientMemory(ProxyError):
    status = 507
    code = "insufficient_memory"


class InsufficientStorage(ProxyError):
    """There is no space for a request body where bodies are stored until they are complete."""

    status = 507
    code = "insufficient_storage"
