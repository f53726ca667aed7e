"""Who votes: a language model behind an address, a person in a terminal."""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

import evaluate
import votes
from errors import UserError
from run import Run

N = 6  # prompts


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with answers: `pit` is longer than `original`, and `best_of_2` is `original` itself."""
    monkeypatch.setattr(evaluate, "ENOUGH", N)
    lines = []
    rows = []
    for i in range(N):
        answers = {"original": f"short {i}", "pit": f"a longer text {i}", "best_of_2": f"short {i}"}
        answers["y_w"] = f"a text of the annotators, which is the longest {i}"
        scores = {"quality": {side: len(text) for side, text in answers.items()}}
        prompt = [{"role": "user", "content": f"Question {i}?"}]
        lines.append(json.dumps({"prompt": prompt, "answers": answers, "scores": scores}))
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
    for a, b in votes.ROWS:
        rows.append({"a": a, "b": b, "judge": "quality", "n": N, "delta": 0.5})
    results = {"table1": rows, "judges": {"quality": {"accuracy": 1.0, "margin": 0.5}}}

    def add_results(**parts):
        results.update(parts)

    made = SimpleNamespace(path=tmp_path, results=lambda: results, add_results=add_results)
    made.command = lambda name: Run.command(made, name)
    return made


class Server:
    """An OpenAI-compatible server that replies think(prompt, number of the request).

    A number as the reply is an HTTP status.
    """

    def __init__(self, think):
        self.think = think
        self.requests = []
        self.keys = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                outer.keys.add(self.headers["Authorization"])
                reply = outer.think(request["messages"][0]["content"], len(outer.requests))
                message = {"role": "assistant", "content": reply}
                body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
                status = 200
                if isinstance(reply, int):
                    status = reply
                    body = {"error": {"message": f"error number {reply}"}}
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that has given up
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    """Start servers; their pauses are short, and HF_HUB_OFFLINE is set as for all tests."""
    servers = []

    def start(think):
        servers.append(Server(think))
        return servers[-1]

    monkeypatch.setattr(votes, "PAUSES", (0, 0.001, 0.001, 0.001))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv(votes.KEY, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def longer(prompt, number):
    """Prefers the longer answer."""
    _, first, second = prompt.split("Answer ")[:3]
    return "A" if len(first) > len(second.partition("\n\nWhich")[0]) else "B"


def lines_of(run):
    lines = (run.path / "votes.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines if line]


def rows_by(run, judge):
    return {(r["a"], r["b"]): r for r in run.results()["table1"] if r["judge"] == judge}


def test_a_language_model_becomes_rows_of_table_1(run, serve):
    server = serve(longer)
    votes.ask_llm(run, server.url, "some/model", n=100)
    # three rows differ, in two orders each; pit vs best_of_2 shows the texts of pit vs original
    assert len(server.requests) == N * 3 * 2
    assert {r["model"] for r in server.requests} == {"some/model"}
    assert {r["temperature"] for r in server.requests} == {0.0}
    evaluate.add_votes(run)
    rows = rows_by(run, "some/model")
    assert {sides: row["delta"] for sides, row in rows.items()} == {
        ("original", "y_w"): -1,
        ("pit", "original"): 1,
        ("pit", "best_of_2"): 1,
        ("pit", "y_w"): -1,
    }
    assert rows["pit", "original"]["n"] == N
    number, agrees, bias, unread = run.results()["votes"]["some/model"]
    assert number == f"18 votes. A row of Table 1 needs {N}."
    assert agrees == "agrees with quality on 100% of 18 pairs."
    assert "decided 0% of 18 pairs" in bias and "0 replies could not be read" in unread
    # nothing is asked again
    votes.ask_llm(run, server.url, "some/model", n=100)
    assert len(server.requests) == N * 3 * 2
    # votes on texts that an evaluation has replaced count no more
    path = run.path / "answers.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    evaluate.add_votes(run)
    assert "decided 0% of 15 pairs" in run.results()["votes"]["some/model"][-2]


def test_who_likes_the_first_answer_sees_ties_and_all_of_it_is_bias(run, serve):
    replies = ["Answer A.", "**Answer:** A"]
    votes.ask_llm(run, serve(lambda prompt, number: replies[number % 2]).url, "first", n=N)
    evaluate.add_votes(run)
    assert "decided 100% of 18 pairs" in run.results()["votes"]["first"][-2]
    assert {row["tie"] for row in rows_by(run, "first").values()} == {1}


def test_nonsense_is_asked_once_more_and_then_a_tie(run, serve):
    server = serve(lambda prompt, number: "A better answer would be B")
    votes.ask_llm(run, server.url, "chatty", n=N)
    assert len(server.requests) == N * 3 * 2 * 2
    assert [m["role"] for m in server.requests[-1]["messages"]] == ["user", "assistant", "user"]
    evaluate.add_votes(run)
    said = "".join(run.results()["votes"]["chatty"])
    assert f"{N * 3 * 2} replies could not be read" in said and "order" not in said
    assert {row["tie"] for row in rows_by(run, "chatty").values()} == {1}


def test_a_reply_that_cannot_be_read_is_no_sign_of_bias(run, serve):
    server = serve(lambda prompt, number: longer(prompt, number).replace("B", "Hm."))
    votes.ask_llm(run, server.url, "x", n=1)
    assert len(lines_of(run)) == 3
    for line in lines_of(run):
        assert line["vote"] == 0 and line["unreadable"] and not line["order_decides"]


def test_what_may_pass_is_tried_again(run, serve):
    busy = {1: 429, 2: 500, 3: 503}
    server = serve(lambda prompt, number: busy.get(number) or longer(prompt, number))
    votes.ask_llm(run, server.url, "busy", n=1)
    assert len(server.requests) == 3 * 2 + len(busy)
    assert {line["vote"] for line in lines_of(run)} == {1, -1}


@pytest.mark.parametrize(
    "status, said",
    [
        (400, "error number 400"),
        (401, "error number 401"),  # a wrong key
        (404, "error number 404"),  # a wrong address, or a wrong name
        (500, "error number 500"),
    ],
)
def test_a_refusal_is_shown_with_what_to_check(run, serve, status, said):
    server = serve(lambda prompt, number: status)
    with pytest.raises(UserError, match=said) as error:
        votes.ask_llm(run, server.url, "some/model", n=1)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and f"some/model at {server.url}" in lines[0] and votes.KEY in lines[1]
    assert not (run.path / "votes.jsonl").exists()


def test_a_refused_command_casts_no_votes_on_equal_answers(run, serve):
    lines = votes.read_answers(run)
    for line in lines:
        line["answers"]["pit"] = line["answers"]["original"]
    (run.path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError):
        votes.ask_llm(run, serve(lambda prompt, number: 404).url, "mistyped")
    assert not votes.read_votes(run)
    server = serve(longer)
    votes.ask_llm(run, server.url, "x")
    cast = votes.read_votes(run)["x"].values()
    assert [vote["vote"] for vote in cast].count(0) == N  # best_of_2 is `original`, too
    assert len(server.requests) == 2 * (len(cast) - N)


def test_who_does_not_answer_is_named(run, serve, monkeypatch):
    server = serve(longer)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match="No verdict from x at http://127.0.0.1"):
        votes.ask_llm(run, server.url, "x", n=1)
    monkeypatch.setattr(votes, "TIMEOUT", 0.02)
    slow = serve(lambda prompt, number: threading.Event().wait(0.1) or "A")
    with pytest.raises(UserError, match="No verdict from x at"):
        votes.ask_llm(run, slow.url, "x", n=1)
    assert len(slow.requests) <= 2  # an attempt takes TIMEOUT: one more, and no third


def test_the_key_comes_from_the_environment_and_the_hubs_is_never_sent(run, serve, monkeypatch):
    server = serve(longer)
    votes.ask_llm(run, server.url, "x", n=1)
    assert server.keys == {"Bearer none"}
    monkeypatch.setenv(votes.KEY, "sesame")
    votes.ask_llm(run, server.url, "y", n=1)
    assert server.keys == {"Bearer none", "Bearer sesame"}
    assert "sesame" not in "".join(p.read_text() for p in run.path.iterdir())


def test_a_line_ends_at_a_line_feed_alone(run):
    """U+2028 and the like end a line for str.splitlines, but may stand within a line of JSON."""
    line = {"judge": "a\u2028b\x85c", "question": "0123", "vote": 1}
    (run.path / "votes.jsonl").write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    assert votes.read_votes(run) == {"a\u2028b\x85c": {"0123": line}}


def test_votes_survive_a_kill(run, serve):
    """The server kills whoever sends request 25 of 36; the same command asks for the rest alone."""
    child = []

    def deadly(prompt, number):
        if number == 25:
            os.kill(child[0], signal.SIGKILL)
        return longer(prompt, number)

    url = serve(deadly).url
    child.append(os.fork())
    if child[0] == 0:
        time.sleep(0.1)  # until the parent knows whom to kill
        votes.ask_llm(run, url, "x")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child[0], 0)[1]) == signal.SIGKILL
    with open(run.path / "votes.jsonl", "a") as file:
        file.write('\n{"judge": "x", "ques')  # as if it had come while a line was written
    before = votes.read_votes(run)["x"]
    assert 0 < len(before) < 3 * N
    server = serve(longer)
    votes.ask_llm(run, server.url, "x")
    assert len(votes.read_votes(run)["x"]) == 3 * N
    assert len(server.requests) == 2 * (3 * N - len(before))


# ---- a person ----------------------------------------------------------------------------------


def type_in(run, monkeypatch, keys):
    """A session of a person who types these keys, and then closes the terminal."""
    typed = iter(keys)

    def read(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    votes.ask_person(run, n=N)


def test_a_person_votes_undoes_quits_and_goes_on(run, monkeypatch, capsys):
    type_in(run, monkeypatch, "u1uq")
    assert "me" not in votes.read_votes(run)  # all that was said was taken back
    type_in(run, monkeypatch, "1?2u2q")
    assert len(votes.read_votes(run)["me"]) == 2
    type_in(run, monkeypatch, "t" * 99)
    mine = votes.read_votes(run)["me"]
    assert len(mine) == 3 * N and [line["vote"] for line in mine.values()].count(0) == 3 * N - 2
    shown = capsys.readouterr().out
    assert shown.count("Please type 1, 2, t, u or q.") == 1
    assert max(map(len, shown.splitlines())) < 80
    assert "pit" not in shown and "original" not in shown and "y_w" not in shown


def test_equal_answers_are_ties_but_not_before_their_turn(run, monkeypatch):
    lines = [json.loads(line) for line in (run.path / "answers.jsonl").read_text().splitlines()]
    for line in lines:
        line["answers"]["y_w"] = line["answers"]["pit"]  # a third of all questions
    (run.path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    order = votes.questions_left(run, "me", N)
    equal = [len(set(question.texts)) == 1 for question in order]
    voted = [place for place, same in enumerate(equal) if not same]
    type_in(run, monkeypatch, "11q")
    # two votes, and the ties before the third
    assert len(votes.read_votes(run)["me"]) == voted[2] < len(order)
    type_in(run, monkeypatch, "1" * 99)
    said = votes.read_votes(run)["me"]
    assert [said[q.id()]["vote"] for q, same in zip(order, equal) if same] == [0] * N


def test_a_person_who_knows_the_sides_always_wins_whatever_the_order(run, monkeypatch, capsys):
    """Always voting for the longer answer, by what is on the screen."""

    def read(prompt):
        screen = capsys.readouterr().out
        first, second = screen.rsplit("--- Answer ")[1:]
        return "1" if len(first) > len(second) else "2"

    monkeypatch.setattr("builtins.input", read)
    votes.ask_person(run, n=N)
    evaluate.add_votes(run)
    rows = rows_by(run, "me")
    assert rows["pit", "original"]["delta"] == 1 and rows["pit", "y_w"]["delta"] == -1
    assert run.results()["votes"]["me"][1:] == ["agrees with quality on 100% of 18 pairs."]


def test_where_both_answers_are_the_same_text_agreement_means_nothing(run, monkeypatch):
    lines = votes.read_answers(run)
    lines[0]["answers"]["pit"] = lines[0]["answers"]["y_w"]
    (run.path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    type_in(run, monkeypatch, "1" * 99)
    evaluate.add_votes(run)
    assert run.results()["votes"]["me"][1].endswith(f"of {3 * N - 1} pairs.")


def test_too_few_votes_make_no_row_but_say_how_many_are_needed(run, monkeypatch):
    monkeypatch.setattr(evaluate, "ENOUGH", N + 1)
    type_in(run, monkeypatch, "t" * 99)
    evaluate.add_votes(run)
    assert rows_by(run, "me") == {}
    assert f"A row of Table 1 needs {N + 1}." in run.results()["votes"]["me"][0]
    row, *_ = [row for row in run.results()["few_votes"] if row["a"] == "pit"]
    assert (row["judge"], row["b"], row["n"], row["delta"]) == ("me", "original", N, 0)


def test_the_order_on_the_screen_is_a_fair_coin():
    questions = [votes.Question(i, ("pit", "original"), f"{i}", ("a", "b")) for i in range(400)]
    turned = sum(int(question.id(), 16) % 2 for question in questions)
    assert 160 < turned < 240


def test_a_person_in_a_terminal(run):
    """A real terminal: no colour, long answers wrapped, q ends it."""
    import pty

    line = json.loads((run.path / "answers.jsonl").read_text().splitlines()[0])
    line["answers"]["pit"] = "word " * 200 + "\x1b[31mred"
    (run.path / "answers.jsonl").write_text(json.dumps(line) + "\n")
    child, terminal = pty.fork()
    if child == 0:
        sys.stdin = os.fdopen(0)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        votes.ask_person(run, n=1)
        sys.stdout.flush()
        os._exit(0)
    screen = b""
    for key in (b"1\n", b"u\n", b"2\n", b"q\n"):
        while not screen.rstrip().endswith(b"q (quit):"):
            screen += os.read(terminal, 4096)
        os.write(terminal, key)
        screen += b"|"
    assert os.waitpid(child, 0)[1] == 0
    os.close(terminal)
    assert b"\x1b" not in screen and max(map(len, screen.decode().splitlines())) <= 80
    assert len(votes.read_votes(run)["me"]) == 1


def test_rows_of_votes_are_replaced_not_added(run, serve):
    votes.ask_llm(run, serve(longer).url, "x", n=100)
    for _ in range(2):
        evaluate.add_votes(run)
    assert sum(row["judge"] == "x" for row in run.results()["table1"]) == 4


def test_a_key_with_a_line_end_is_sent_without_it_and_an_odd_one_never(run, serve, monkeypatch):
    server = serve(longer)
    monkeypatch.setenv(votes.KEY, "sk-secret\r\n")
    votes.ask_llm(run, server.url, "x", n=1)
    assert server.requests
    monkeypatch.setenv(votes.KEY, "\u201csk-secret\u201d")
    with pytest.raises(UserError, match=f"the key in {votes.KEY}") as error:
        votes.ask_llm(run, server.url, "y", n=1)
    assert "secret" not in str(error.value)


def test_lines_that_are_no_votes_are_passed_over(run):
    lines = ["{}", "5", "null", '{"judge": "me"}', '{"judge": "me", "question": "0123"}']
    (run.path / "votes.jsonl").write_text("\n".join(lines))
    assert not votes.read_votes(run).get("me")


def test_who_votes_reads_the_whole_conversation():
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "hey")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    line = {"prompt": prompt, "answers": {"pit": "a", "original": "b"}}
    (question,) = votes.questions_about([line])
    assert question.prompt == "User: hi\n\nAssistant: ho\n\nUser: hey"
