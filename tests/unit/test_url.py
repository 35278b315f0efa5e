"""Broker URLs: what is read, what is refused and how, and that no password shows."""

from __future__ import annotations

import copy
import pickle
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tars_mqtt.url import BrokerURL, parse_urls

SECRET = "Zq7hunter2Zq7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mqtt://localhost", BrokerURL("mqtt", "localhost", 1883)),
        ("mqtt://localhost/", BrokerURL("mqtt", "localhost", 1883)),
        ("MQTT://localhost:1884", BrokerURL("mqtt", "localhost", 1884)),
        ("mqtts://broker.example.com", BrokerURL("mqtts", "broker.example.com", 8883)),
        ("mqtt://my_broker.:1", BrokerURL("mqtt", "my_broker.", 1)),
        ("mqtt://bücher.example:65535", BrokerURL("mqtt", "bücher.example", 65_535)),
        ("mqtt://10.0.0.1", BrokerURL("mqtt", "10.0.0.1", 1883)),
        ("mqtt://[::1]", BrokerURL("mqtt", "::1", 1883)),
        ("mqtts://[2001:db8::7]:8884", BrokerURL("mqtts", "2001:db8::7", 8884)),
        ("mqtt://[fe80::1%25eth0]:1883", BrokerURL("mqtt", "fe80::1%eth0", 1883)),
        ("mqtt://u@h", BrokerURL("mqtt", "h", 1883, "", "u", None)),
        ("mqtt://u:p@h", BrokerURL("mqtt", "h", 1883, "", "u", "p")),
        ("mqtt://u:@h", BrokerURL("mqtt", "h", 1883, "", "u", "")),
        ("mqtt://:p@h", BrokerURL("mqtt", "h", 1883, "", None, "p")),
        ("mqtt://@h", BrokerURL("mqtt", "h", 1883)),
        ("mqtt://u:a:b@h", BrokerURL("mqtt", "h", 1883, "", "u", "a:b")),
        ("mqtt://u%40x:p%2F%23%3F%40%25%2C%3A@h", BrokerURL("mqtt", "h", 1883, "", "u@x", "p/#?@%,:")),
        ("mqtt://u:%C3%A9+%00@h", BrokerURL("mqtt", "h", 1883, "", "u", "é+\0")),
        ("ws://h", BrokerURL("ws", "h", 80, "/mqtt")),
        ("ws://h/", BrokerURL("ws", "h", 80, "/")),
        ("wss://u:p@h:9001/a%20b?token=x", BrokerURL("wss", "h", 9001, "/a%20b?token=x", "u", "p")),
        ("wss://h?token=x", BrokerURL("wss", "h", 443, "/mqtt?token=x")),
        ("mqtt+unix:///run/mqtt.sock", BrokerURL("mqtt+unix", "", 0, "/run/mqtt.sock")),
        ("mqtt+unix:///run/a@b%20c", BrokerURL("mqtt+unix", "", 0, "/run/a@b c")),
        ("mqtt+unix://u:p@/run/mqtt.sock", BrokerURL("mqtt+unix", "", 0, "/run/mqtt.sock", "u", "p")),
    ],
)
def test_a_url_is_read_into_its_parts(text: str, expected: BrokerURL) -> None:
    assert BrokerURL.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty: write 'mqtt://localhost:1883'"),
        ("localhost:1883", "no scheme: write 'mqtt://localhost:1883'"),
        ("localhost", "no scheme"),
        ("mqtt:localhost", "no scheme"),
        ("mqtt:/localhost", "no scheme"),
        ("tcp://localhost:1883", "called 'mqtt' here, not 'tcp'"),
        ("ssl://localhost:8883", "called 'mqtts' here, not 'ssl'"),
        ("TLS://localhost:8883", "called 'mqtts' here, not 'tls'"),
        ("https://localhost/mqtt", "called 'wss' here, not 'https'"),
        ("unix:///run/mqtt.sock", "called 'mqtt+unix' here, not 'unix'"),
        ("ftp://localhost", "scheme is unknown: use mqtt, mqtts, ws, wss or mqtt+unix"),
        ("://localhost", "scheme is unknown"),
        ("mqtt://", "no host"),
        ("mqtt:///", "no host"),
        ("mqtt://:1883", "no host"),
        ("mqtt://u:p@", "no host"),
        ("mqtt://u:p@:1883", "no host"),
        ("ws:///mqtt", "no host"),
        ("mqtt://h:", "port must be a number from 1 to 65,535"),
        ("mqtt://h:0", "port must be"),
        ("mqtt://h:70000", "port must be"),
        ("mqtt://h:-1", "port must be"),
        ("mqtt://h:+1", "port must be"),
        ("mqtt://h:1_0", "port must be"),
        ("mqtt://h:mqtt", "port must be"),
        ("mqtt://h:\u0661", "port must be"),
        ("mqtt://[::1]:x", "port must be"),
        ("mqtt://h/1883", "port stands behind a colon"),
        ("mqtt://::1", "an IPv6 address stands in brackets, 'mqtt://[::1]:1883'"),
        ("mqtt://2001:db8::7:1883", "stands in brackets"),
        ("mqtt://[::1", "brackets are out of place"),
        ("mqtt://[::1]1883", "brackets are out of place"),
        ("mqtt://[localhost]:1883", "do not hold an IPv6 address"),
        ("mqtt://[]", "do not hold an IPv6 address"),
        ("mqtt://[10.0.0.1]", "do not hold an IPv6 address"),
        ("mqtt://a..b", "not a host name"),
        ("mqtt://a*b", "not a host name"),
        ("mqtt://" + "a" * 64, "not a host name"),
        ("mqtt://" + "a." * 200, "not a host name"),
        ("mqtt://%6c", "not a host name"),
        ("mqtt://h/path", "has a path, a query or a fragment"),
        ("mqtts://h?query", "has a path, a query or a fragment"),
        ("mqtt://h:1883#fragment", "has a path, a query or a fragment"),
        ("mqtt://h//", "has a path, a query or a fragment"),
        ("ws://h/mqtt#x", "fragment"),
        ("ws://h/mqtt/é", "must be ASCII"),
        ("mqtt://u:p@ss@h", "%40"),
        ("mqtt://u:p/w@h", "%2F"),
        ("mqtt://u:p#w@h", "%23"),
        ("mqtt://u:p?w@h", "%3F"),
        ("ws://u:1/w@h/mqtt", "%2F"),
        ("mqtt+unix://u:1/w@/run/x", "%2F"),
        ("mqtt://u:p%w@h", "write '%' as %25"),
        ("mqtt://u:p%4@h", "write '%' as %25"),
        ("mqtt://u%zz@h", "write '%' as %25"),
        ("mqtt://u:%FF@h", "password does not decode to UTF-8"),
        ("mqtt://%FF:p@h", "user name does not decode to UTF-8"),
        ("mqtt://u%00:p@h", "user name contains the character U+0000"),
        ("mqtt://u:" + "x" * 65_536 + "@h", "password is longer than 65,535 bytes"),
        ("mqtt://my host", "white space"),
        (" mqtt://h", "white space"),
        ("mqtt://h\n", "white space"),
        ("mqtt://h\0", "unprintable"),
        ("mqtt://u:\ud800@h", "unprintable"),
        ("mqtt+unix://run/mqtt.sock", "write three slashes"),
        ("mqtt+unix://", "no path"),
        ("mqtt+unix:///", "no path"),
        ("mqtt+unix:///run/a?b", "%3F"),
        ("mqtt+unix:///run/a%00b", "U+0000"),
    ],
)
def test_a_malformed_url_is_refused_with_the_way_out(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^the URL") as caught:
        BrokerURL.parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "tls", "transport"),
    [
        ("mqtt://h", False, "tcp"),
        ("mqtts://h", True, "tcp"),
        ("ws://h", False, "websockets"),
        ("wss://h", True, "websockets"),
        ("mqtt+unix:///s", False, "unix"),
    ],
)
def test_the_scheme_decides_the_transport(text: str, tls: bool, transport: str) -> None:
    url = BrokerURL.parse(text)
    assert (url.tls, url.transport) == (tls, transport)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mqtt://h", "mqtt://h:1883"),
        ("mqtt://u:p@h", "mqtt://u:***@h:1883"),
        ("mqtt://u:@h", "mqtt://u:***@h:1883"),
        ("mqtt://:p@h", "mqtt://:***@h:1883"),
        ("mqtt://a%40b@h", "mqtt://a%40b@h:1883"),
        ("mqtt://[::1]", "mqtt://[::1]:1883"),
        ("mqtt://[fe80::1%25eth0]", "mqtt://[fe80::1%25eth0]:1883"),
        ("wss://h/p?token=x", "wss://h:443/p?***"),
        ("mqtt+unix://u:p@/run/a%20b", "mqtt+unix://u:***@/run/a%20b"),
    ],
)
def test_a_url_shows_itself_without_its_secrets(text: str, shown: str) -> None:
    url = BrokerURL.parse(text)
    assert str(url) == url.redacted == shown
    assert BrokerURL.parse(shown).redacted == shown


def test_two_urls_that_differ_in_the_password_only_look_alike_and_differ() -> None:
    one, other = BrokerURL.parse("mqtt://u:p@h"), BrokerURL.parse("mqtt://u:q@h")
    assert one != other
    assert repr(one) == repr(other)


def test_a_url_survives_copying_and_pickling_with_its_password() -> None:
    url = BrokerURL.parse("mqtt://u:p@h")
    assert pickle.loads(pickle.dumps(url)) == copy.deepcopy(url) == url


def test_several_urls_are_separated_by_commas_and_spaces() -> None:
    assert parse_urls("mqtt://a") == (BrokerURL("mqtt", "a", 1883),)
    assert parse_urls(" mqtt://a , mqtts://u:p%2Cw@b:1,ws://c ") == (
        BrokerURL("mqtt", "a", 1883),
        BrokerURL("mqtts", "b", 1, "", "u", "p,w"),
        BrokerURL("ws", "c", 80, "/mqtt"),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the URL is empty"),
        ("mqtt://a,", "number 2 of 2: the URL is empty"),
        (",mqtt://a", "number 1 of 2: the URL is empty"),
        ("mqtt://a,b,mqtt://c", "number 2 of 3: the URL has no scheme"),
        ("mqtt://u:p,w@a", "a comma inside a password is written %2C"),
        ("mqtt://a\n,mqtt://b", "number 1 of 2: the URL contains white space"),
    ],
)
def test_a_malformed_url_among_several_is_counted(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^(number|the URL)") as caught:
        parse_urls(text)
    assert words in str(caught.value)


SCHEMES = ["mqtt", "mqtts", "ws", "wss", "mqtt+unix", "tcp", "ssl", "foo", "", "mqtt,mqtt"]
SHAPES = [
    "{}://u:{}@h:1883",
    "{}://:{}@h/x",
    "{}://u:{}",
    "{}:u:{}@h",
    "u:{1}@h",
    "{}://u:{}@[::1",
    "{}://u:{}@/s,mqtt://h",
]


def chain(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *chain(error.__context__ or error.__cause__)]


@given(
    st.sampled_from(SHAPES),
    st.sampled_from(SCHEMES),
    st.text(st.sampled_from("@/?#:,%[] \n\0\ud800é09a-._")),
)
@example("{}://u:{}", "mqtt", "")
@example("{}://u:{}@h:1883", "ws", "/x@")
@example("{}://u:{}@h:1883", "mqtt", ",mqtt://")
def test_no_error_and_no_repr_shows_a_password_that_was_not_percent_encoded(
    shape: str, scheme: str, part: str
) -> None:
    """Not even the errors that ours came from, which tools that report tracebacks show as well."""
    # Without a host of the shape's own, what stands behind an "@" is the host, and no secret.
    assume("@" in shape or "@" not in part)
    text = shape.format(scheme, f"{SECRET}{part}{SECRET}")
    try:
        urls = parse_urls(text)
    except ValueError as error:
        for each in chain(error):
            assert SECRET not in f"{each!s} {each!r} {each.args!r}"
    else:
        for url in urls:
            assert SECRET not in f"{url} {url!r} {url.host} {url.path} {url.username}"


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_whatever_was_percent_encoded_is_read_back(username: str, password: str) -> None:
    username = username.replace("\0", "") or "u"
    (url,) = parse_urls(f"mqtt://{quote(username, safe='')}:{quote(password, safe='')}@h")
    assert (url.username, url.password, url.host) == (username, password, "h")


@given(st.text())
def test_any_text_is_urls_or_a_value_error(text: str) -> None:
    for prefix in ("", "mqtt://", "ws://", "mqtt+unix://", "mqtt://u:p@"):
        try:
            urls = parse_urls(prefix + text)
        except ValueError as error:
            assert type(error) is ValueError, "an error of ours, none of a codec's"  # noqa: PT017
        else:
            assert all(BrokerURL.parse(str(url)).host == url.host for url in urls)
