# Settings of mlxproxy. Copy this file to config.py in the same folder and remove the "#" in front
# of each setting you change. The file is Python; Path is predefined. Environment variables
# (MLXPROXY_<NAME>) and the command line (`make run NAME=value`) override it.

# -- Models folder, or several separated by ':' (in config.py: a list).
# -- Default: LM Studio's own models folder.
# MODELS_ROOT = "~/.lmstudio/models"  # several: ["/Volumes/SSD/models", "/more/models"]

# -- The mlx_lm.server program.
# -- Default: the one next to the running Python, else the one on PATH.
# MLX_SERVER_BIN = Path.home() / "mlx-server/bin/mlx_lm.server"

# -- The mlx_vlm.server program, for models that see, embed or rank (`make install-vision`).
# -- Default: the one next to the running Python, else the one on PATH, if there is one.
# VLM_SERVER_BIN = Path.home() / "vision/bin/mlx_vlm.server"

# -- Port of the backend (mlx_lm.server) on 127.0.0.1.
# MLX_BACKEND_PORT = 18080

# -- Address to listen on; 127.0.0.1 for this machine only.
# PROXY_HOST = "0.0.0.0"

# -- Port to listen on.
# PROXY_PORT = 8080

# -- A second port to listen on, such as 11434, for Ollama's clients that cannot be told another
# -- one: there, the address itself answers as Ollama does.
# OLLAMA_PORT = 11434

# -- Default thinking mode, for loads that do not set enable_thinking.
# ENABLE_THINKING = False

# -- requested: a request that names a model on disk gets that model, any other the loaded one;
# -- loaded: the loaded model answers every request, whatever model it names.
# MODEL_SELECTION = "loaded"

# -- Models in memory at a time, each on a port from MLX_BACKEND_PORT up; auto: as many as fit into
# -- memory (up to 8).
# MAX_LOADED = 1

# -- Memory for all models together, such as 24GB or 60%.
# -- Default: what Metal recommends on macOS; elsewhere what is free, but with MAX_LOADED above 1 at
# -- most 80%.
# MEMORY_BUDGET = "24GB"

# -- Disk space for what models have computed for earlier prompts, so that it need not be computed
# -- again after a swap or a restart, such as 50GB or 20% of the free disk; 0: keep nothing on disk.
# -- Default: 20GB, or a tenth of the free disk if that is less.
# PROMPT_CACHE_DISK = "50GB"

# -- Options for a model, by its id or a pattern: of a load (enable_thinking, ttl, pin, context,
# -- draft_model, adapter, kv_bits, prompt_cache_bytes, decode_concurrency, engine: mlx_lm or
# -- mlx_vlm), and of requests that do not say (temperature, top_p, top_k, min_p,
# -- repetition_penalty, presence_penalty, frequency_penalty, max_tokens, reasoning_effort,
# -- system). See docs/settings.md.
# MODELS = {"*/Qwen3-*": {"ttl": "30m", "temperature": 0.6}}

# -- Names of your own for a model with options, listed as models.
# PROFILES = {"coder": {"model": "Qwen3-Coder-30B-A3B", "temperature": 0.2, "system": "Be brief."}}

# -- Other names, or patterns of them, for a model, a profile, or "loaded".
# ALIASES = {"gpt-*": "loaded", "claude-*": "coder"}

# -- Other machines that run mlxproxy, whose models this one offers too. See docs/several-macs.md.
# PEERS = {"studio": {"url": "http://studio.local:8080", "key": "its API key"}}

# -- Sampling of requests that set none: model: as the model's generation_config.json says; greedy:
# -- always the likeliest token.
# SAMPLING_DEFAULTS = "model"

# -- Model to load at start; last: the most recently loaded one.
# -- Default: none.
# PRELOAD = "last"

# -- Seconds without a request before the model is unloaded; 0: never.
# IDLE_TTL = 0

# -- Keep a process ready that has imported mlx-lm, so that the next load is quick.
# STANDBY = True

# -- Seconds before a load is considered failed.
# LOAD_TIMEOUT = 600

# -- Seconds that a swap or unload waits for answers in flight to finish.
# DRAIN_TIMEOUT = 120

# -- Seconds the backend gets to exit after SIGTERM before it is killed with SIGKILL.
# STOP_TIMEOUT = 10

# -- Seconds that one step of the backend's work may take before the backend is considered dead.
# STALL_TIMEOUT = 300

# -- Seconds that answers in flight get to finish when the proxy stops.
# SHUTDOWN_TIMEOUT = 30

# -- Maximum number of answers in flight.
# MAX_CONCURRENT = 32

# -- Maximum number of queued requests; further ones get 429.
# MAX_QUEUE = 64

# -- Maximum tokens in an answer if the request sets no limit (never more than the model's context).
# MAX_TOKENS = 8192

# -- Largest request body in bytes, or with a unit (K, M, G).
# -- Default: 32M.
# MAX_BODY = "32M"

# -- One or more API keys; every path except /health requires one.
# -- Default: none.
# API_KEY = ["a-long-random-key"]

# -- File with one API key per line (blank lines and lines that start with # are ignored); only its
# -- owner may have access to it.
# -- Default: none.
# API_KEY_FILE = "~/.config/mlxproxy/keys"

# -- Browser origins whose pages may call the API; *: any.
# -- Default: pages served from this machine.
# ALLOWED_ORIGINS = ["http://openwebui.local:3000"]

# -- Additional host names to accept in the Host header; *: any.
# -- Default: IP addresses, localhost, *.local and this machine's names.
# TRUSTED_HOSTS = ["mac.example.ts.net"]

# -- Names that a request may set in chat_template_kwargs.
# TEMPLATE_KWARGS = ["enable_thinking", "reasoning_effort"]

# -- Log level of the proxy: DEBUG, INFO, WARNING or ERROR.
# LOG_LEVEL = "INFO"
