"""The page of ``inspect --html`` in headless Chromium: what it shows is what Python says.

At a position the page must show what :func:`classify` and :func:`summarize` say of the text cut
off there, which know nothing of positions in between.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from browser import addresses_asked, start_chromium
from helpers import MODEL, ROOT

from vllm_sepllm.cli.inspection import classify, inspect_text, summarize
from vllm_sepllm.cli.inspection_html import html_page
from vllm_sepllm.cli.inspection_memory import kv_bytes, read_shape
from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.separators import num_token_ids

pytestmark = pytest.mark.e2e

TEXT = (ROOT / "examples/data/860.txt").read_text(encoding="utf-8")[2000:4500] + (
    "On 3 May 1912 Anna sold 48 clips in Rome; Bob had 7, and 2,500 were left. " * 4
)
CONFIGS = {
    "default": {"window_size": 64},
    "bound": {"window_size": 40, "max_separator_tokens": 19, "position_mode": "cache"},
    "small bound": {"window_size": 1, "max_separator_tokens": 1, "num_sink_tokens": 17},
    "spans": {"window_size": 50, "preset": "facts"},
    "bounded spans": {
        "window_size": 33,
        "keep": ["separators", "digits"],
        "keep_after": {"digits": 2},
        "max_separator_tokens": 30,
    },
    "classes": {
        "window_size": 30,
        "keep": ["separators", "special", "digits", "names", "capitalized", " the"],
    },
    "interval": {"window_size": 64, "policy": "fixed_interval", "interval": 7},
    "streaming": {"window_size": 64, "policy": "streaming"},
    "no sinks": {"window_size": 16, "num_sink_tokens": 0, "keep": ["digits"]},
    "wide window": {"window_size": 5000},
}
# Moves the slider as a hand does; the page acts in the next frame.
MOVE = """
const [position, method, done] = arguments;
const button = document.querySelector(`#methods [value="${method}"]`);
if (!button.checked) button.click();
const slider = document.getElementById("slider");
slider.value = position;
slider.dispatchEvent(new Event("input", { bubbles: true }));
requestAnimationFrame(() => requestAnimationFrame(() => {
  const texts = (query) => Array.from(document.querySelectorAll(query), (x) => x.textContent);
  const states = (query) => Array.from(document.querySelectorAll(query),
    (cell) => cell.className.split(" ")[1]);
  done({
    classes: Array.from(document.querySelectorAll("#text span"), (x) => x.className.split(" ")),
    counts: Array.from(document.querySelectorAll("#counts li:not([hidden])"),
      (x) => [x.querySelector("span").textContent, x.querySelector("b").textContent]),
    summary: texts("#summary dd"),
    strips: texts(".strip p"),
    window: states(".cells.of-window i"),
    stream: states(".cells.stream i"),
    compared: Array.from(document.querySelectorAll("#compare tbody tr"),
      (x) => [x.dataset.method, ...Array.from(x.querySelectorAll("td"), (y) => y.textContent)]),
    value: document.getElementById("position").value,
  });
}));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, tokenizer, tmp_path):
    """Write a page and open it. At the end it has asked for nothing and complained of nothing."""
    addresses = set()

    def open_page(options, text=TEXT, limit=0, block_size=16, model=MODEL):
        config = SepLLMConfig.from_dict(options)
        inspection = inspect_text(tokenizer, config, text, block_size)
        file = tmp_path / "page.html"
        source = html_page(model, inspection, limit, read_shape(model))
        file.write_text(source, encoding="utf-8")
        addresses_asked(browser)
        browser.get(file.as_uri())
        addresses.add(file.as_uri())
        return inspection

    yield open_page
    assert addresses_asked(browser) <= addresses
    assert browser.get_log("browser") == []


def rule_of(inspection, tokenizer, method="served"):
    """The rule that a method of the page stands for."""
    rule = KeepRule.of(inspection.found.resolve(inspection.config), num_token_ids(tokenizer))
    if method == "streaming":
        options = {"policy": "streaming", "window_size": rule.window_size}
        config = SepLLMConfig.from_dict(options | {"num_sink_tokens": rule.num_sink_tokens})
        return KeepRule.of(config, num_token_ids(tokenizer))
    return rule


def names_of(inspection):
    """What the page calls each kind of token."""
    from vllm_sepllm.cli.inspection_words import labels

    return labels(inspection.config) | {"dropped": "dropped"}


def whole(text):
    return int(text.split()[0].replace(",", ""))


def check_tokens(shown, inspection, rule, position):
    """Classes and counts of a position, beside those of the text that ends there."""
    ids = inspection.token_ids[: position + 1]
    kinds = classify(ids, rule, inspection.found.by_class)
    start = max(0, position - rule.window_size + 1)
    names, flags = names_of(inspection), rule.kept_flags(ids)
    expected = Counter({"not there yet": len(inspection.token_ids) - position - 1})
    css_of = {}
    for k, (kind, classes) in enumerate(zip(kinds, shown["classes"], strict=False)):
        is_beyond = kind == "dropped" and flags[k]
        expected["beyond the bound" if is_beyond else names[kind]] += 1
        if is_beyond or kind == "dropped":
            assert classes[0] == ("beyond" if is_beyond else "dropped"), k
        assert css_of.setdefault(kind, classes[0]) == classes[0] or is_beyond or kind == "dropped"
        assert ("also" in classes) == (k >= start and bool(flags[k])), k
        assert ("query" in classes) == (k == position), k
    assert all(classes[0] == "future" for classes in shown["classes"][position + 1 :])
    assert not any(classes[0] == "future" for classes in shown["classes"][: position + 1])
    assert css_of["window"] == "window"
    assert css_of.get("sink", "sink") == "sink"
    looks = [css for kind, css in css_of.items() if kind != "dropped"]
    assert len(set(looks)) == len(looks), "two kinds look the same"
    found = Counter({name: whole(count) for name, count in shown["counts"]})
    assert +found == +expected


def check_pages(shown, inspection, rule, position):
    """Counts, cells and bytes of a position, beside those of the text that ends there."""
    size = inspection.summary.block_size
    summary = summarize(inspection.token_ids[: position + 1], rule, size)
    held, full = summary.kept_pages + summary.window_pages, summary.full_pages
    assert whole(shown["summary"][0]) == summary.num_seen
    assert shown["summary"][1] == (
        f"{held:,} of {full:,} page{'s' * (full != 1)}, {held / full:.1%}"
    )
    assert [p for p, state in enumerate(shown["window"]) if state == "held"] == list(
        range(position // size - summary.window_pages + 1, position // size + 1)
    )
    assert shown["window"].count("future") == len(shown["window"]) - position // size - 1
    assert shown["stream"].count("held") == summary.kept_pages
    made = -(-summary.num_kept // size)
    assert shown["stream"].count("freed") == made - summary.kept_pages
    assert all(state == "future" for state in shown["stream"][made:])
    assert f"Window: {summary.window_pages} held" in shown["strips"][0]


def check_full(shown, inspection, position):
    """Full attention sees all and frees nothing."""
    pages = -(-(position + 1) // inspection.summary.block_size)
    assert [classes[0] for classes in shown["classes"][: position + 1]] == (
        ["window"] * (position + 1)
    )
    assert all(classes == ["future"] for classes in shown["classes"][position + 2 :])
    assert dict(shown["counts"])["seen"] == f"{position + 1:,}"
    assert shown["strips"] == [f"All tokens: {pages} held"]
    assert shown["window"].count("held") == pages
    assert shown["stream"] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_the_page_is_what_python_says(opened, browser, tokenizer, name):
    inspection = opened(CONFIGS[name])
    last = len(inspection.token_ids) - 1
    size = inspection.config.window_size
    places = {last, 0, 1, 15, 16, 17, size - 1, size, size + 1, last // 2, last - 1}
    methods = ["served"] if name == "streaming" else ["served", "streaming"]
    # Up, down and far: what is repainted depends on where the slider was.
    for position in [*sorted(p for p in places if p <= last), last // 3, last, 3]:
        for method in methods:
            shown = browser.execute_async_script(MOVE, position, method)
            assert shown["value"] == str(position)
            rule = rule_of(inspection, tokenizer, method)
            check_tokens(shown, inspection, rule, position)
            check_pages(shown, inspection, rule, position)
    check_full(browser.execute_async_script(MOVE, last // 2, "full"), inspection, last // 2)


def test_at_the_end_it_is_what_the_terminal_says(opened, browser):
    inspection = opened(CONFIGS["bound"])
    summary = inspection.summary
    last = summary.num_tokens - 1
    shown = browser.execute_async_script(MOVE, last, "served")
    assert whole(shown["summary"][0]) == summary.num_seen
    assert whole(shown["summary"][1]) == summary.kept_pages + summary.window_pages
    [cached] = [text for text in shown["summary"] if " " not in text.strip()]
    assert whole(cached) == summary.num_seen - 1  # position in the cache


def test_every_position_is_reached_in_steps_as_in_a_jump(opened, browser):
    inspection = opened(CONFIGS["bounded spans"], TEXT[:900])
    last = len(inspection.token_ids) - 1
    steps = """
        const all = () => document.getElementById("text").innerHTML.replaceAll(" looked", "");
        const one = [];
        for (let p = 0; p <= last; p++) { goTo(p); one.push(all()); }
        for (let p = last; p >= 0; p--) {
          goTo(0); goTo(p);
          if (all() !== one[p]) return p;
        }
        return null;
    """
    assert browser.execute_script(f"const last = {last}; {steps}") is None


def test_bytes_are_those_of_the_pages(opened, browser):
    inspection = opened(CONFIGS["default"] | {"dense_layers": [0]})
    position = len(inspection.token_ids) - 1
    summary, shape = inspection.summary, read_shape(MODEL)
    shown = browser.execute_async_script(MOVE, position, "served")
    held = summary.kept_pages + summary.window_pages
    kept = kv_bytes(shape, 16 * held, shape.num_layers - 1)
    dense = kv_bytes(shape, 16 * summary.full_pages, 1)
    full = kv_bytes(shape, 16 * summary.full_pages)
    written = [f"{(kept + dense) / 2**10:.0f} KiB", f"{full / 2**20:.1f} MiB"]
    assert shown["summary"][2] == " of ".join(written)
    assert [row[3] for row in shown["compared"]][:2] == written


def test_without_a_model_folder_there_are_pages_alone(opened, browser):
    opened(CONFIGS["default"], model="some/model")
    shown = browser.execute_async_script(MOVE, 100, "served")
    assert len(shown["summary"]) == 2
    assert not browser.find_element("css selector", "#compare .bytes").is_displayed()


def position_of(browser):
    return browser.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame("
        "() => done([Number(slider.value), now.position, Number(position.value)])));"
    )


def test_keys_move_the_slider(opened, browser):
    from selenium.webdriver.common.keys import Keys

    last = len(opened(CONFIGS["default"]).token_ids) - 1
    slider = browser.find_element("id", "slider")
    for key, expected in (
        (Keys.HOME, 0),
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_UP, 2),
        (Keys.ARROW_LEFT, 1),
        (Keys.END, last),
    ):
        slider.send_keys(key)
        assert position_of(browser) == [expected] * 3
    slider.send_keys(Keys.PAGE_DOWN)
    assert 0 < position_of(browser)[0] < last
    assert slider.get_attribute("aria-valuetext").startswith(f"{position_of(browser)[0]}, ")
    assert browser.find_element("css selector", "label[for=slider]").text == "Position"


def test_a_number_and_a_click_move_it_too(opened, browser):
    opened(CONFIGS["default"])
    field = browser.find_element("id", "position")
    for typed, expected in (("123", 123), ("99999", 123), ("", 123)):
        browser.execute_script(
            "position.value = arguments[0]; position.dispatchEvent(new Event('input'));"
            "position.dispatchEvent(new Event('change'))",
            typed,
        )
        assert position_of(browser) == [expected] * 3
    assert field.is_displayed()
    tokens = browser.find_elements("css selector", "#text span")
    tokens[125].click()
    assert position_of(browser) == [125] * 3
    details = browser.find_element("id", "details").text
    assert "at position 125" in details
    assert "the token that looks back; leaves the window at position 189" in details


def test_buttons_and_keys_choose_the_method(opened, browser):
    from selenium.webdriver.common.keys import Keys

    opened(CONFIGS["default"])
    titles = [label.text for label in browser.find_elements("css selector", "#methods label")]
    assert titles == ["SepLLM", "Full attention", "StreamingLLM"]
    browser.find_elements("css selector", "#methods label")[2].click()
    assert browser.execute_script("return now.method") == "streaming"
    browser.find_element("css selector", "#methods :checked").send_keys(Keys.ARROW_LEFT)
    assert browser.execute_script("return now.method") == "full"
    marked = browser.find_element("css selector", "#compare .chosen-method th").text
    assert marked == "Full attention"


def test_every_token_says_what_happens_to_it(opened, browser, tokenizer):
    inspection = opened(CONFIGS["bound"])
    rule = rule_of(inspection, tokenizer)
    flags = rule.kept_flags(inspection.token_ids)
    position, n, size = len(flags) - 1, rule.window_size, 16
    browser.execute_async_script(MOVE, position, "served")
    tell = "describe(arguments[0]); return document.getElementById('details').textContent"
    dropped = next(k for k in range(20, len(flags)) if not flags[k])
    said = browser.execute_script(tell, dropped)
    assert f"(id {inspection.token_ids[dropped]})" in said
    assert f"left the window at position {dropped + n}" in said
    page = dropped // size
    freed = (page + 1) * size + n - 1
    assert f"window page {page} was freed at position {freed}" in said
    before, after = (
        summarize(inspection.token_ids[: p + 1], rule, size).window_pages
        for p in (freed - 1, freed)
    )
    assert after < before
    kept = next(k for k in range(20, len(flags)) if flags[k])
    entry = int(flags[:kept].sum())
    said = browser.execute_script(tell, kept)
    assert f"kept as separator: entry {entry} of the stream, on its page {entry // size}" in said
    unseen = int(said.split("fell behind the bound at position ")[1].split(";")[0])
    assert classify(inspection.token_ids[:unseen], rule)[kept] == "chosen"
    assert classify(inspection.token_ids[: unseen + 1], rule)[kept] == "dropped"
    browser.execute_async_script(MOVE, 5, "served")
    assert "not there yet" in browser.execute_script(tell, kept)


def test_a_freed_page_of_the_stream_says_when(opened, browser, tokenizer):
    inspection = opened(CONFIGS["bound"], block_size=4)
    rule = rule_of(inspection, tokenizer)
    freed = browser.execute_script("return found.served.streamPageFreed(3)")
    sizes = [
        -(-summary.num_kept // 4) - summary.kept_pages
        for summary in (summarize(inspection.token_ids[:p], rule, 4) for p in (freed, freed + 1))
    ]
    assert sizes[1] == sizes[0] + 1 == 3  # pages 1, 2 and 3


def test_a_reader_with_keys_goes_from_token_to_token(opened, browser):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    opened(CONFIGS["default"])
    browser.execute_async_script(MOVE, 50, "served")
    text = browser.find_element("id", "text")
    text.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    assert position_of(browser) == [50] * 3
    assert browser.execute_script("return now.looked") == 49
    live = browser.find_element("id", "live")
    WebDriverWait(browser, 10).until(
        lambda _: "at position 49" in live.get_attribute("textContent")
    )
    text.send_keys(Keys.ENTER)
    assert position_of(browser) == [49] * 3


def test_a_screen_reader_is_told_once_the_slider_rests(opened, browser):
    opened(CONFIGS["default"])
    counted = browser.execute_async_script("""
        const done = arguments[0];
        const live = document.getElementById("live");
        live.textContent = "";
        const heard = [];
        new MutationObserver(() => heard.push(live.textContent)).observe(live, { childList: true });
        for (let p = 10; p < 40; p++) goTo(p);
        const wait = () => heard.length ? done(heard) : setTimeout(wait, 50);
        setTimeout(wait, QUIET);
    """)
    assert len(counted) == 1
    assert counted[0].startswith("SepLLM at position 39: sees 40 of 40 tokens, 100.0%; holds ")
    assert browser.find_element("id", "live").get_attribute("aria-live") == "polite"


def test_play_moves_on_its_own_unless_motion_is_unwanted(opened, browser):
    from selenium.webdriver.support.wait import WebDriverWait

    opened(CONFIGS["default"])
    play = browser.find_element("id", "play")
    play.click()
    assert play.text == "Pause"
    WebDriverWait(browser, 10).until(lambda _: position_of(browser)[1] > 3)
    play.click()
    assert play.text == "Play"
    stopped = position_of(browser)
    assert position_of(browser) == stopped
    wish = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
    opened(CONFIGS["default"])
    assert not browser.find_element("id", "play").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


CONTRAST = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => channels(colour).slice(0, 3).map((x) => x / 255)
  .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  const colour = getComputedStyle(node).backgroundColor;
  return channels(colour)[3] === 0 ? behind(node.parentElement) : colour;
};
return Array.from(document.querySelectorAll(
    "#text span, #counts span, #legend span, #legend td, #details, .about, #methods label, dt"))
  .map((node) => {
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.className, node.textContent];
  }).sort((a, b) => a[0] - b[0])[0];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_both_schemes(opened, browser, scheme):
    wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
    backgrounds = set()
    for name in ("classes", "bound"):
        inspection = opened(CONFIGS[name])
        browser.execute_async_script(MOVE, len(inspection.token_ids) - 40, "served")
        for _ in range(2):  # as the system wishes, and the other one by the button
            contrast, where, _ = browser.execute_script(CONTRAST)
            assert contrast >= 4.5, where
            shade = "return getComputedStyle(document.body).backgroundColor"
            backgrounds.add(browser.execute_script(shade))
            browser.find_element("id", "theme").click()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(backgrounds) == 2


EVIL = (
    "</script><script>document.title = 'owned'</script>"
    "<img src=x onerror=\"document.title='owned'\">"
    "<!-- <script> \u2028\u202e\x00\x1b[31m &lt; &amp; ]]> ${1} $title </div></textarea>\n" * 3
)


def test_a_text_that_means_harm_is_text(opened, browser):
    options = {"window_size": 8, "keep": ["separators", "<", "script"]}
    inspection = opened(options, EVIL, model="<img src=x onerror=alert(1)></title>")
    assert browser.title == "SepLLM on <img src=x onerror=alert(1)></title>"
    browser.execute_async_script(MOVE, 30, "served")
    assert browser.find_elements("css selector", "img, #text script") == []
    assert browser.execute_script("return document.scripts.length") == 2
    shown = browser.execute_script("return document.getElementById('text').textContent")
    assert EVIL.partition("<!--")[0] in shown
    assert not {"\x00", "\x1b", "\u202e", "\u2028"} & set(shown)
    assert len(inspection.token_ids) == browser.execute_script("return tokens.length")
    blocked = browser.execute_script("""
        const added = document.createElement("script");
        added.textContent = "document.title = 'owned'";
        document.body.append(added);
        return document.title;
    """)
    assert blocked != "owned"
    assert any(
        "Content Security Policy" in entry["message"] for entry in browser.get_log("browser")
    )


def test_a_long_text_is_shown_from_its_beginning(opened, browser, tokenizer):
    text = TEXT * 4
    inspection = opened(CONFIGS["default"], text, limit=500)
    shown = browser.execute_async_script(MOVE, 499, "served")
    assert len(shown["classes"]) == 500
    cut = inspection.token_ids[:500]
    rule = rule_of(inspection, tokenizer)
    assert whole(shown["summary"][0]) == summarize(cut, rule, 16).num_seen
    notice = browser.find_element("class name", "notice").text
    assert f"first 500 of {len(inspection.token_ids):,} tokens" in notice


def test_one_token_is_enough(opened, browser):
    opened({"window_size": 4}, limit=1)
    shown = browser.execute_async_script(MOVE, 0, "served")
    assert shown["classes"] == [["window", "query", "also", "looked"]]
    assert whole(shown["summary"][0]) == 1


def test_it_fits_a_phone(opened, browser):
    phone = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    opened(CONFIGS["spans"])
    widths = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert widths == [400, 400]


def test_many_pages_share_cells(opened, browser):
    inspection = opened({"window_size": 64}, TEXT * 6, block_size=1)
    last = len(inspection.token_ids) - 1
    assert last > 2000
    shown = browser.execute_async_script(MOVE, last, "served")
    assert len(shown["window"]) <= 2000
    assert shown["strips"][0].startswith(f"Window: 64 held, {last - 63:,} freed (a cell is ")


def test_the_demo_writes_a_page(browser, tmp_path):
    import runpy
    import sys

    sys.path.insert(0, str(ROOT / "examples"))
    demo = runpy.run_path(str(ROOT / "examples/demo.py"))
    sys.path.remove(str(ROOT / "examples"))
    file = tmp_path / "folder" / "demo.html"
    demo["write_page"](file)
    browser.get(Path(file).as_uri())
    shown = browser.execute_async_script(MOVE, 1000, "served")
    assert whole(shown["summary"][0]) < 1001
    assert json.loads(browser.execute_script("return JSON.stringify(data.window)")) == 64
