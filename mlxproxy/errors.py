"""One exception type per error code of the HTTP contract, and their one rendering.

Nothing here knows Flask: the controller, the catalogue and the relay raise these, the blueprints
turn them into a response, and a stream that has begun carries them as its last event.
"""

from __future__ import annotations

from typing import Any


class ProxyError(Exception):
    """An error a client can read, in the shape of OpenAI's API.

    Args:
        message: a sentence that says what is wrong and what to do next.
        param: the name of the request's field at fault, if one is.
        retry_after: seconds after which another try makes sense (sent as ``Retry-After``).
        details: further fields for the error object.
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
        """The JSON object of the contract: ``{"error": {message, type, param, code}}``."""
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
    """The prompt does not fit; clients shorten it when they see OpenAI's code for that."""

    code = "context_length_exceeded"

    @classmethod
    def of(cls, prompt: str, context: int, param: str | None = None) -> ContextLengthExceeded:
        """Return the error in the words by which clients recognise it.

        Args:
            prompt: how long it is: "12 tokens", "more than 100 tokens".
            context: tokens that the model can take.
            param: the request's field with the prompt.
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
    """What should not have happened: the details are in the log, never in the answer."""


class LoadFailed(ProxyError):
    status = 500
    code = "load_failed"


class BackendFailed(ProxyError):
    status = 502
    code = "backend_failed"


class NoModelLoaded(ProxyError):
    status = 503
    code = "no_model_loaded"


class ModelsRootUnavailable(ProxyError):
    status = 503
    code = "models_root_unavailable"


class ModelSwapped(ProxyError):
    """The answer was ended because another model was asked for and the drain took too long."""

    status = 503
    code = "model_swapped"


class ModelUnloaded(ProxyError):
    """The answer was ended because an unload was asked for and the drain took too long."""

    status = 503
    code = "model_unloaded"


class PortInUse(ProxyError):
    """A process that is not ours holds the backend's port."""

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
    """A body has no room where bodies wait until they are whole."""

    status = 507
    code = "insufficient_storage"
