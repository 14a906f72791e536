"""Whose request is whose."""

from flyray.actors.request import Generate, Progress
from flyray.actors.request_book import RequestBook
from flyray.actors.step_news import StepNews
from flyray.actors.step_plan import Sampling


def generate(name: str) -> Generate:
    return Generate(name, (1,), 1, Sampling(0.0, 1.0, 0, 0), (), 0, False)


def news(name: str, finish: str = "") -> Progress:
    return Progress(name, (5,), (-1.0,), (), finish, "")


def test_news_reach_their_clients_under_the_clients_names() -> None:
    book = RequestBook()
    one, two = book.open(b"one", generate("same")), book.open(b"two", generate("same"))
    assert one is not None
    assert two is not None
    assert one.request != two.request
    told = StepNews(["99/gone", one.request], [4, 5], [-2.0, -1.0], [news(two.request, "stop"), news("99/unknown")])
    assert book.deliver(told) == {
        b"one": StepNews(["same"], [5], [-1.0]),
        b"two": StepNews(items=[news("same", "stop")]),
    }
    assert book.close(b"two", "same") is None  # it was finished
    assert book.close(b"one", "same") == one.request
    assert book.deliver(StepNews([one.request], [5], [-1.0], [news(one.request)])) == {}


def test_a_name_is_free_again_once_its_request_is_finished() -> None:
    book = RequestBook()
    first = book.open(b"me", generate("name"))
    assert first is not None
    assert book.open(b"me", generate("name")) is None
    book.deliver(StepNews(items=[news(first.request, "length")]))
    second = book.open(b"me", generate("name"))
    assert second is not None
    assert second.request != first.request


def test_a_client_that_is_gone_loses_all_its_requests_and_no_others() -> None:
    book = RequestBook()
    mine = [book.open(b"me", generate(name)) for name in ("a", "b")]
    other = book.open(b"other", generate("a"))
    assert book.close_all(b"me") == [(name, each.request) for name, each in zip("ab", mine, strict=True) if each]
    assert book.close_all(b"me") == []
    assert other is not None
    assert book.close(b"other", "a") == other.request
