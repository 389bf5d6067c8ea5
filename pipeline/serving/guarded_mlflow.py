"""MLflow's server for uvicorn, guarded: see `pipeline.serving.guarded`."""

from __future__ import annotations

import os

from mlflow.server.fastapi_app import app as unguarded

from pipeline.serving.guard import Guard, origins_of

app = Guard(unguarded, origins_of(os.environ))
