"The benchmark of the views runs small: every row is there, nothing is timed against a goal."
import json
import pytest
from vlwb.bench import browser, widgets
from vlwb.bench.measure import as_json
from vlwb.bench.run import BENCHES, run_bench


def test_every_control_moves_something():
    "A control that changes nothing would be timed for nothing."
    for make, controls in ((lambda g: widgets.Explorer(g), widgets.explorer_controls), (lambda g: widgets.RegulationLab(g), widgets.regulation_controls), (lambda g: widgets.Studio(g), widgets.studio_controls),
                           (lambda g: widgets.DocumentView(widgets.bench_documents(3, 3, 1, 2)), widgets.document_controls)):
        view = make(widgets.bench_gallery(60, 16)); widgets.overheard(view)
        for name, (prepare, change) in controls(view).items():
            if name == 'strongest suspects': continue                # looks, and changes nothing
            seen = []
            prepare(1); view.state.observe(seen.append); change(1); view.state.unobserve(seen.append)
            assert seen, f'{type(view).__name__}: {name}'


def test_rows_of_a_small_run(monkeypatch):
    monkeypatch.setattr(widgets, 'bench_browser', lambda *_, **__: [])     # in a test of its own
    rows = run_bench('widgets', tiny=True)
    names = [r.name for r in rows]
    for part in ('explorer, threshold', 'regulation lab, tau_s', 'studio, K', 'retrieval browser, query', 'document view, document', 'document view, numbers', 'document view, opening', 'explorer, opening', 'matplotlib', 'thumbnails', 'memory'): assert any(part in n for n in names), part
    assert not any(r.goal for r in rows) and all(r.value >= 0 for r in rows)
    json.loads(as_json(rows))


def test_without_a_browser_one_row_says_what_to_install(monkeypatch):
    monkeypatch.setenv('VLWB_CHROMIUM', 'no-such-browser')
    row, = widgets.bench_browser({1000: ('<= 150', '<= 2000')})
    assert 'install' in row.sizes and row.value == 0 and row.met is None


def test_a_canvas_is_overheard():
    view = widgets.open_explorer(widgets.bench_gallery(30, 8)); said = widgets.overheard(view)
    assert [name for name, _ in said] == ['similarity', 'marks'] and said[1][1] == 30*30


def test_names():
    assert set(BENCHES) == {'losses', 'rerank', 'mining', 'retrieval', 'scenes', 'imports', 'widgets'}
    with pytest.raises(ValueError, match='no benchmark'): run_bench('speed')


@pytest.mark.browser
def test_in_a_browser():
    if missing := browser.browser_missing(): pytest.skip(missing)
    rows = {r.name: r.value for r in widgets.bench_browser({50: ('', '')}, rounds=1, width=16, others=50)}
    assert rows['messages to the kernel while zooming, N = 50'] == 0
    assert len(rows) == 10 + (1 + 2) + len(widgets.OTHERS) and 'document view, opening, to the matrix' in rows and all(v > 0 for k, v in rows.items() if not k.startswith('messages'))
