"""A store's server in a process of its own: `python server.py gs|s3 PORT REFUSAL_FILE`.

While the refusal file exists, every request that writes is answered with 403.
"""

import os
import sys
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any


def serve_gs(port: int, refusal: Path) -> None:
    """gcp-storage-emulator, with conditions on generations, which it ignores, in uploads."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def may_write(response: Any) -> bool:
        if refusal.exists():
            response.status = HTTPStatus.FORBIDDEN
            response.json({"error": {"code": 403, "message": "no permission"}})
        return not refusal.exists()

    def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
        def handle(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> Any:
            if may_write(response):
                return handler(request, response, storage, *args, **kwargs)
            return None

        return handle

    download_file = objects.download

    def generation(request: Any, storage: Any, name: str) -> str:
        try:
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            return "0"

    def insert(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> Any:
        if expected := request.query.get("ifGenerationMatch"):
            named = request.query.get("name") or [request.data["meta"]["name"]]
            if generation(request, storage, named[0]) != expected[0]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return None
        return objects.insert(request, response, storage, *args, **kwargs)

    def download(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> Any:
        name = request.params["object_id"]
        response["X-Goog-Generation"] = generation(request, storage, name)
        return download_file(request, response, storage, *args, **kwargs)

    # The table of routes holds the functions themselves.
    replaced = {
        objects.insert: guarded(insert),
        objects.delete: guarded(objects.delete),
        objects.patch: guarded(objects.patch),
        objects.upload_partial: guarded(objects.upload_partial),
        objects.download: download,
    }
    # The handler of objects calls it where their content is asked for.
    objects.download = download
    handlers = [
        (path, {method: replaced.get(function, function) for method, function in table.items()})
        for path, table in server.HANDLERS
    ]
    server.HANDLERS = tuple(handlers)
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).run()


def serve_s3(port: int, refusal: Path) -> None:
    """moto's S3."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    application = DomainDispatcherApplication(create_backend_app)

    def guarded(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environment["REQUEST_METHOD"] in ("PUT", "POST", "DELETE") and refusal.exists():
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>no permission</Message></Error>"]
        return application(environment, start)

    run_simple("127.0.0.1", port, guarded, threaded=True)


BUCKET = "bucket"

if __name__ == "__main__":
    scheme, port, refusal = sys.argv[1:]
    # The tests' JAX settings do not matter here.
    os.environ.pop("XLA_FLAGS", None)
    (serve_gs if scheme == "gs" else serve_s3)(int(port), Path(refusal))
