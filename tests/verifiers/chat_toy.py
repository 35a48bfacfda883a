"""A server of OpenAI's chat interface that says what a test wants it to say."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers with what `replies` gives for a request: (status, body, headers) or a text for a chat completion."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.paths: list[str] = []
        self.replies = lambda request: "Score: 7"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                outer.headers.append(dict(self.headers))
                outer.paths.append(self.path)
                reply = outer.replies(request)
                if isinstance(reply, str):
                    reply = (200, json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}), {})
                status, body, headers = reply
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body.encode())
                except OSError:  # the judge did not wait
                    pass

            def log_message(self, *arguments) -> None:
                pass

        class Http(ThreadingHTTPServer):
            request_queue_size = 128  # of 5 some connections are reset on a busy machine

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
