"""A stand-in for the Hub, and the real client pointed at it."""

from types import SimpleNamespace

import pytest
from hub_server import Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; the client in this process has an empty cache, no token, and does not wait."""
    import huggingface_hub as client
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http, disable_progress_bars

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    disable_progress_bars()
    with Hub() as server:
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "no-tokens"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        server.waits = []
        clock = SimpleNamespace(sleep=server.waits.append, time=_http.time.time)
        clock.monotonic = _http.time.monotonic
        monkeypatch.setattr(_http, "time", clock)
        monkeypatch.setattr(file_download, "time", clock)
        client.utils.close_session()
        yield server
        client.utils.close_session()
