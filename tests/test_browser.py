"The libraries under the views, seen to work in JupyterLab and voila: a canvas of our own, bqplot's curves, jupyter-scatter's points. And the harness itself."
import os, statistics, subprocess, sys
from pathlib import Path
import pytest
from vlwb.bench import browser

CELL = r'''
import anywidget, bqplot, ipywidgets as W, jscatter, numpy as np, traitlets
from IPython.display import display
class Matrix(anywidget.AnyWidget):
    "Bytes from the kernel on a canvas; a click comes back."
    _esm = """export default { render({model, el}) {
      const c = document.createElement('canvas'); c.className = 'matrix'; c.tabIndex = 0; c.style.width = '200px'; el.append(c);
      c.dataset.lmSuppressShortcuts = 'true';   // on the element that has the focus: on one around it, JupyterLab takes the keys all the same
      const draw = () => { const v = model.get('values'), n = Math.sqrt(v.byteLength), x = c.getContext('2d'); c.width = c.height = n;
        const p = x.createImageData(n, n); for (let i = 0; i < n*n; i++) { const g = v.getUint8(i); p.data.set([g, 128, 255 - g, 255], 4*i); } x.putImageData(p, 0, 0); c.dataset.drawn = +(c.dataset.drawn || 0) + 1; };
      c.onclick = e => { model.set('clicked', [Math.floor(e.offsetY/c.clientHeight*c.height), Math.floor(e.offsetX/c.clientWidth*c.width)]); model.save_changes(); };
      c.onkeydown = e => { model.set('key', e.key); model.save_changes(); };
      model.on('change:values', draw); draw(); } }"""
    values = traitlets.Bytes().tag(sync=True); clicked = traitlets.List().tag(sync=True); key = traitlets.Unicode().tag(sync=True)
grid = np.add.outer(np.arange(100), np.arange(100))
matrix = Matrix(values=grid.astype('uint8').tobytes())
x = np.linspace(0, 1, 200); scales = dict(x=bqplot.LinearScale(), y=bqplot.LinearScale(min=-1, max=1))
line = bqplot.Lines(x=x, y=np.sin(6*x), scales=scales)
figure = bqplot.Figure(marks=[line], axes=[bqplot.Axis(scale=scales['x'], label='x'), bqplot.Axis(scale=scales['y'], orientation='vertical', label='y')], title='curve', layout=dict(width='400px', height='260px'))
points = jscatter.Scatter(x=np.array([0., -1, 1, -1, 1]), y=np.array([0., -1, -1, 1, 1]), width=300, height=240); points.size(default=20); points.axes(False)
slider = W.IntSlider(value=0, max=20, description='shift'); shown = W.Label('shift 0')
def moved(change):
    matrix.values = (grid + 10*change.new).astype('uint8').tobytes(); line.y = np.sin(6*x + change.new); shown.value = f'shift {change.new}'
slider.observe(moved, 'value')
for widget, name in ((slider, 'slider'), (figure, 'curve'), (points.widget, 'points'), (shown, 'shown')): widget.add_class(name)
'''
SHOW = "display(W.VBox([W.HBox([slider, shown]), W.HBox([matrix, figure]), points.widget]))"


@pytest.mark.parametrize('where', ['lab', 'voila'])
def test_the_libraries_draw_and_answer(where, request, tmp_path):
    open_page = request.getfixturevalue(where)
    page = open_page([CELL, browser.watch('matrix', ['clicked', 'key'], tmp_path/'matrix.json'), browser.watch('points.widget', ['selection'], tmp_path/'points.json'),
                      browser.watch('slider', ['value'], tmp_path/'slider.json'), SHOW])
    page.page.locator('.curve path.line').first.wait_for(state='attached'); page.page.locator('.points canvas').first.wait_for(); page.page.wait_for_timeout(500)
    matrix, points, curve = page.pixels('canvas.matrix'), page.pixels('.points canvas'), page.page.locator('.curve path.line').first.get_attribute('d')
    assert len(set(matrix.split(','))) > 50 and len(set(points.split(','))) > 2, 'the canvases show something'

    page.slide('.slider', 4); page.page.get_by_text('shift 4', exact=True).wait_for()
    assert browser.wait_state(tmp_path/'slider.json', lambda s: s['value'] == 4)
    assert page.wait_pixels('canvas.matrix', matrix)
    assert page.page.locator('.curve path.line').first.get_attribute('d') != curve

    page.page.locator('canvas.matrix').click(position=dict(x=51, y=101))
    assert browser.wait_state(tmp_path/'matrix.json', lambda s: s['clicked'])['clicked'] == [50, 25]
    page.page.keyboard.press('a')                                    # JupyterLab would insert a cell, but for data-lm-suppress-shortcuts
    assert browser.wait_state(tmp_path/'matrix.json', lambda s: s['key'])['key'] == 'a'
    if where == 'lab': assert page.page.evaluate('window.jupyterapp.shell.currentWidget.content.widgets.length') == 5

    box = page.page.locator('.points canvas').first.bounding_box()
    page.page.mouse.move(box['x'] + box['width']/2 + 1, box['y'] + box['height']/2 + 1); page.page.mouse.click(box['x'] + box['width']/2, box['y'] + box['height']/2)
    assert browser.wait_state(tmp_path/'points.json', lambda s: s['selection'])['selection'] == [0]
    assert page.wait_pixels('.points canvas', points)
    if where == 'lab': assert page.ask('[slider.value, matrix.clicked]') == [4, [50, 25]]
    page.shot(open_page.shots/f'libraries-{where}.png')


@pytest.mark.parametrize('where', ['lab', 'voila'])
def test_dark_theme(where, request):
    open_page = request.getfixturevalue(where)
    page = open_page([CELL, SHOW], dark=True); page.page.locator('.curve path.line').first.wait_for(state='attached')
    paper = page.page.evaluate('getComputedStyle(document.body).getPropertyValue("--jp-layout-color0")').strip()
    assert paper in ('#111', '#111111') and page.page.evaluate('document.body.dataset.jpThemeLight') == 'false'
    page.page.wait_for_timeout(500); page.shot(open_page.shots/f'libraries-{where}-dark.png')


def test_times_are_taken_in_the_browser(lab):
    page = lab([CELL, SHOW]); page.page.locator('.curve path.line').first.wait_for(state='attached')
    for target, attribute in (('.shown', None), ('canvas.matrix', 'data-drawn'), ('.curve', None)):
        found = page.time_change('.slider .noUi-handle', target, attribute=attribute, times=3)
        assert all(0 < f['change'] <= f['frame'] < 5000 for f in found)
        print(target, {k: round(statistics.median(f[k] for f in found)) for k in ('change', 'frame')}, 'ms')
    page.page.evaluate('document.body.append(Object.assign(document.createElement("i"), {className: "nothing-moves"}))')
    with pytest.raises(Exception, match='no change in .nothing-moves'): page.time_change('.slider .noUi-handle', '.nothing-moves', times=1, timeout=.5)


def test_a_failing_cell_is_told_in_voila(voila):
    with pytest.raises(RuntimeError, match='ZeroDivisionError'): voila(['1/0'])


def test_what_goes_wrong_is_told(lab, tmp_path):
    with pytest.raises(RuntimeError, match='ValueError: from a cell'): lab(['raise ValueError("from a cell")'])
    page = lab(['''from IPython.display import HTML, display
display(HTML('<img src="no-such-picture.png"><script>console.error("said aloud")</script>'))'''])
    page.page.wait_for_timeout(500)
    said = page.complaints()
    assert any('said aloud' in c for c in said) and any('no-such-picture.png' in c for c in said)
    lab.allow += ['said aloud', 'no-such-picture']
    with pytest.raises(RuntimeError, match='NameError'): page.ask('not_a_name')
    with pytest.raises(TimeoutError): browser.wait_state(tmp_path/'never.json', timeout=.1)


@pytest.mark.parametrize('ci', ['', 'true'])
def test_a_missing_chromium_skips_at_home_and_fails_in_ci(ci):
    env = {**os.environ, 'VLWB_CHROMIUM': 'no-such-browser', 'CI': ci}
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-rs', '-p', 'no:cacheprovider', f'{__file__}::test_times_are_taken_in_the_browser'],
                          capture_output=True, text=True, env=env, cwd=Path(__file__).parent.parent)
    assert 'apt-get install chromium' in done.stdout and done.returncode == (1 if ci else 0), done.stdout
    assert ('1 failed' in done.stdout or '1 error' in done.stdout) if ci else '1 skipped' in done.stdout
