# Settings of mlxproxy. Copy this file to config.py in the same folder and remove the "#" before
# what you change. It is Python; Path is there. The environment (MLXPROXY_<NAME>) and the command
# line (`make run NAME=value`) win over this file.

# -- Folder of the models, or several with ':' between them (in config.py a list).
# -- Default: LM Studio's own models folder.
# MODELS_ROOT = "~/.lmstudio/models"  # several: ["/Volumes/SSD/models", "/more/models"]

# -- The mlx_lm.server program.
# -- Default: the mlx_lm.server beside the running Python, else on PATH.
# MLX_SERVER_BIN = Path.home() / "mlx-server/bin/mlx_lm.server"

# -- Port of the backend, on 127.0.0.1.
# MLX_BACKEND_PORT = 18080

# -- Address to listen on; 127.0.0.1 for this machine only.
# PROXY_HOST = "0.0.0.0"

# -- Port to listen on.
# PROXY_PORT = 8080

# -- Thinking, for loads that do not say.
# ENABLE_THINKING = False

# -- loaded: the loaded model answers whatever a request names; requested: a request that names
# -- another known model swaps to it.
# MODEL_SELECTION = "loaded"

# -- A model to load at start, or last.
# -- Default: none.
# PRELOAD = "last"

# -- Seconds without a request until the model is unloaded; 0: never.
# IDLE_TTL = 0

# -- Seconds until a load has failed.
# LOAD_TIMEOUT = 600

# -- Seconds that a swap or unload waits for answers in flight.
# DRAIN_TIMEOUT = 120

# -- Seconds between SIGTERM and SIGKILL for the backend.
# STOP_TIMEOUT = 10

# -- Seconds without a byte until the backend is taken for dead.
# STALL_TIMEOUT = 300

# -- Seconds that a stop of the proxy lets answers finish.
# SHUTDOWN_TIMEOUT = 30

# -- Answers in flight.
# MAX_CONCURRENT = 32

# -- Requests waiting for a model or a place; past it 429.
# MAX_QUEUE = 64

# -- Tokens of an answer whose request does not say (never more than the model's context).
# MAX_TOKENS = 8192

# -- Largest request body.
# -- Default: 32M.
# MAX_BODY = "32M"

# -- One key or several; every path but /health needs one.
# -- Default: none.
# API_KEY = ["a-long-random-key"]

# -- File with one key a line (blank lines and those that begin with # do not count), readable by
# its owner only.
# -- Default: none.
# API_KEY_FILE = "~/.config/mlxproxy/keys"

# -- Browser origins that may call, * for any.
# -- Default: pages of this machine.
# ALLOWED_ORIGINS = ["http://openwebui.local:3000"]

# -- Further names that a Host header may carry, * for any.
# -- Default: addresses, localhost, *.local, this machine's names.
# TRUSTED_HOSTS = ["mac.example.ts.net"]

# -- Names a request may set in chat_template_kwargs.
# TEMPLATE_KWARGS = ["enable_thinking", "reasoning_effort"]

# -- How much the proxy logs.
# LOG_LEVEL = "INFO"
