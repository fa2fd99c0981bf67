"The training monitor: logs as they really grow, its task without a browser, and the curves in JupyterLab and voila."
import asyncio, gc, json, math, threading, time, weakref
import pytest
from vlwb.bench import browser
from ipywidgets.widgets.widget import _instances
from vlwb.train.loop import RunLog, read_log
from vlwb.widgets.monitor import LogTail, Monitor, MonitorState, charts_of, find_runs, run_status


def write(folder, *records, end='\n'):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/'log.jsonl', 'a') as f: f.write('\n'.join(json.dumps(r) for r in records) + end)


def test_a_log_read_while_it_is_written(tmp_path):
    "Bytes come in any portions; what is kept is what `read_log` gives."
    lines = [dict(step=k, loss=1/k, seconds=k/7, note='räd\u2028') for k in range(1, 200)]
    data = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in lines).encode()
    tail, path = LogTail(tmp_path), tmp_path/'log.jsonl'
    cuts = [0, 1, 40, 41, 90, 1000, 1003, len(data)//2, len(data)-1, len(data)]
    for a, b in zip(cuts, cuts[1:]):
        with open(path, 'ab') as f: f.write(data[a:b])
        tail.look(); assert not tail.broken and len(tail) == data[:b].count(b'\n')
    assert tail.series('loss')[1].tolist() == [r['loss'] for r in lines] and tail.offset == len(data)


def test_only_new_bytes_are_read(tmp_path):
    write(tmp_path, *(dict(step=k, loss=0.) for k in range(5000)))
    tail = LogTail(tmp_path); tail.look()
    write(tmp_path, dict(step=5000, loss=1.))
    piece = tail.fetch(); assert len(piece.records) == 1 and not piece.restarted and len(piece.mark) == 64
    assert tail.take(piece) and not tail.take(piece), 'a look that was overtaken is dropped'
    assert len(tail) == 5001


@pytest.mark.parametrize('step', [10, 0])
def test_a_run_that_goes_on(tmp_path, step):
    "RunLog drops what comes after the checkpoint and writes the file anew, of any length."
    write(tmp_path, *(dict(step=k, loss=float(k), seconds=float(k)) for k in range(1, 21)))
    tail = LogTail(tmp_path); tail.look()
    log = RunLog(tmp_path, step)
    for k in range(step + 1, 41): log.add(dict(step=k, loss=-float(k), seconds=float(k - step)))
    assert tail.look()
    x, y = tail.series('loss'); assert x.tolist() == list(range(1, 41)) and y.tolist() == [r['loss'] for r in read_log(tmp_path)]
    elapsed = tail.elapsed(); assert (elapsed[1:] > elapsed[:-1]).all() and elapsed[-1] == 40
    assert tail.series('seconds_per_step')[1].max() == 1


def test_records_without_numbers(tmp_path):
    write(tmp_path, dict(step=1, loss=None, text='x', flag=True, deep=dict(a=1)), dict(step=2, loss=math.nan), dict(step=3, loss=math.inf, **{'val_R@1': 5}), [1], 'x', dict(loss=1), dict(step=math.nan))
    tail = LogTail(tmp_path); tail.look()
    assert len(tail) == 3 and tail.broken == 4 and set(tail.columns) == {'loss', 'val_R@1'} and tail.series('temperature')[1].size == 0
    state = MonitorState(tmp_path); assert state.gaps() == {tmp_path.name: {'loss': 3}} and '3 of loss' in state.words()


def test_one_record_no_record_no_folder(tmp_path):
    assert MonitorState(tmp_path/'none').words().startswith('No log yet') and MonitorState([]).words().startswith('No log yet in no folder')
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'log.jsonl').write_text('')
    monitor = Monitor(tmp_path, live=False); assert 'empty' in monitor.status.value and 'No record yet.' in monitor.says.value and not monitor.charts
    write(tmp_path/'run', dict(step=1, loss=2., logit_scale=20.)); monitor.now.click()
    assert 'one record so far' in monitor.status.value and len(monitor.charts) == 2 and '1 point' in monitor.charts['loss', ('loss',)].summary
    monitor.x.value = 'seconds'; assert not monitor.charts and 'No record says the seconds' in monitor.says.value and 'No record' in monitor.figure().alt
    assert LogTail(tmp_path/'run'/'log.jsonl').look() is False, 'a file in place of a folder'


def test_states_in_words(tmp_path):
    write(tmp_path, dict(step=1, seconds=0.), dict(step=2, seconds=100.))
    tail = LogTail(tmp_path); tail.look(); at = tail.changed
    assert [run_status(tail, at + s).state for s in (0, -5, 499, 501)] == ['running', 'running', 'running', 'stalled']
    assert run_status(tail, at + 501).words.startswith('stalled for 8 min')
    (tmp_path/'checkpoint-00000002').mkdir(); state = tmp_path/'checkpoint-00000002'/'state.json'
    state.write_text('{"extra": {"config": {"steps": 4}}}'); tail.look(); assert run_status(tail, at + 999).state == 'stalled' and 'step 2 of 4' in run_status(tail, at).words
    (tmp_path/'model').mkdir(); (tmp_path/'model'/'model.safetensors').write_text(''); tail.look(); assert run_status(tail, at + 999).state == 'finished'
    write(tmp_path, dict(step=3, seconds=150.)); import os; os.utime(tmp_path/'log.jsonl', (at + 60, at + 60)); tail.look()
    assert run_status(tail, at + 61).state == 'running', 'the model is older than the log: the run goes on'


def test_new_runs_are_found_and_shown(tmp_path):
    for name in 'abcdefgh': write(tmp_path/name, dict(step=1, loss=1.))
    write(tmp_path/'.hidden', dict(step=1)); write(tmp_path/'a'/'checkpoint-00000001', dict(step=1))
    state = MonitorState(tmp_path); assert len(state.available) == 8 and len(state.chosen) == 6
    state.chosen = ['h']; write(tmp_path/'z'/'deep', dict(step=1, loss=1.)); state.look()
    assert state.chosen == ['h', 'z/deep'] and '.hidden' not in state.available and find_runs(tmp_path, most=3).keys() == {'a', 'b', 'c'}
    monitor = Monitor(tmp_path, live=False, chosen=['b']); assert monitor.runs.value == ('b',) and monitor.state.chosen == ['b']


def test_the_task_looks_without_blocking(tmp_path):
    "Reading runs in another thread: the loop goes on while a slow disk is read; stop and start are the button's."
    write(tmp_path, dict(step=1, loss=1., seconds=1.))
    async def session():
        monitor = Monitor(tmp_path, live=True, every=.2); threads, ticks, fetch = [], 0, monitor.state.fetch
        def slow(): threads.append(threading.current_thread()); time.sleep(.3); return fetch()
        monitor.state.fetch = slow
        assert monitor.live.value and monitor.live.description == 'Watching'
        write(tmp_path, dict(step=2, loss=math.nan), dict(step=3, loss=.5, seconds=3.)); start = time.monotonic()
        while len(threads) < 3 and time.monotonic() - start < 20: await asyncio.sleep(.01); ticks += 1
        assert ticks > 10 and all(t is not threading.main_thread() for t in threads) and len(monitor.state.tails[tmp_path.name]) == 3
        monitor.live.value = False; await asyncio.sleep(0); assert monitor._task is None and monitor.live.description == 'Watch'
        done = len(threads); await asyncio.sleep(.6); assert len(threads) <= done + 1
        monitor.live.value = True; assert monitor._task is not None; monitor.stop(); assert not monitor.live.value
    asyncio.run(session())


def test_a_closed_view_is_gone_with_its_task_and_widgets(tmp_path):
    write(tmp_path, dict(step=1, loss=1., seconds=1.), dict(step=2, loss=.5, seconds=2.))
    async def session(end):
        before = set(_instances); monitor = Monitor(tmp_path, live=True, every=.2); gone = weakref.ref(monitor)
        await asyncio.sleep(.4); assert len(asyncio.all_tasks()) == 2 and set(_instances) > before
        end(monitor); del monitor; await asyncio.sleep(.1); gc.collect()
        assert len(asyncio.all_tasks()) == 1 and gone() is None and set(_instances) == before
    asyncio.run(session(lambda m: m.widget.close())); asyncio.run(session(lambda m: m.close()))


def test_between_looks_the_task_keeps_nothing_alive(tmp_path):
    write(tmp_path, dict(step=1, loss=1.))
    async def session():
        monitor = Monitor(tmp_path, live=True, every=.3); await asyncio.sleep(.15); gone = weakref.ref(monitor)
        for w in list(_instances.values()): w.unobserve_all()                           # ipywidgets keeps all widgets, and they their view
        monitor.state.unobserve_all(); del monitor; gc.collect(); assert gone() is None
        await asyncio.sleep(.4); assert len(asyncio.all_tasks()) == 1
    asyncio.run(session())


def test_it_rests_while_no_page_shows_it(tmp_path):
    write(tmp_path, dict(step=1, loss=1.))
    async def session():
        monitor = Monitor(tmp_path, live=True, every=.2); w = monitor.widget; assert w._view_count == 0 and monitor.live.value
        w._view_count = 1; w._view_count = 2; w._view_count = 1; assert monitor.live.value
        w._view_count = 0; await asyncio.sleep(0); assert not monitor.live.value and len(asyncio.all_tasks()) == 1
        w._view_count = 1; assert monitor.live.value and monitor._task is not None
        monitor.live.value = False; w._view_count = 0; w._view_count = 1; assert not monitor.live.value, 'who stopped it wants it stopped'
        monitor.close()
    asyncio.run(session())


def test_what_is_dropped_is_closed(tmp_path):
    "ipywidgets keeps every widget that is not closed: charts, sections and curves come and go, their number does not grow."
    for name, more in (('a', {}), ('b', dict(hardness=.5, alpha=.1))): write(tmp_path/name, *(dict(step=k, loss=1/k, seconds=k/3, lr=.1*k, **more) for k in range(1, 60)))
    write(tmp_path/'timeless', dict(step=1, loss=2.))
    before = set(_instances); monitor = Monitor(tmp_path, live=False); s = monitor.state
    def count(change): change(); return len(set(_instances) - before)
    def there_and_back():
        monitor.x.value = 'seconds'; monitor.x.value = 'step'
        for chosen in (['a'], ['timeless'], [], ['a', 'b', 'timeless']): s.chosen = chosen
        monitor.smooth.value = 0.; monitor.smooth.value = .05
    kept = dict(monitor.charts); first = count(lambda: None)
    assert count(lambda: [setattr(monitor.x, 'value', x) for x in ('seconds', 'step')*5]) == first and monitor.charts == kept
    monitor.x.value = 'seconds'; chart = monitor.charts['loss', ('loss',)]; dots = chart._marks['a'][1]
    assert chart.x_axis.label == 'seconds of training' == dots.tooltip.labels[0] and dots.tooltip.labels[1] == 'a, loss'; monitor.x.value = 'step'
    assert chart.x_axis.label == 'step' == dots.tooltip.labels[0]
    assert {count(there_and_back) for _ in range(4)} == {first}
    s.chosen = ['a']; shown = {w.model_id for w in (monitor.panel, *monitor.panel.children, *monitor.charts.values(), *(m for c in monitor.charts.values() for m in c.chart.marks))}
    assert shown <= set(_instances), 'nothing that is shown is closed'
    monitor.close(); assert set(_instances) == before; s.look()


def test_without_a_loop_it_says_so(tmp_path):
    monitor = Monitor(tmp_path, live=True); assert not monitor.live.value and 'No event loop' in monitor.says.value


def test_fourteen_charts_of_six_runs_are_quick(tmp_path):
    keys = ['loss', 'contrast', 'itm', 'mlm', 'alpha', 'logit_scale', 'lr', 'grad_norm', 'hardness', 'synthetic_hardness', 'val_strict_R@1', 'val_all_R@1', 'weight_auroc', 'removed']
    for r in 'abcdef': write(tmp_path/r, *(dict(step=k, seconds=k/9, **{key: (k % 97)/97 + .1 for key in keys}) for k in range(2000)))
    monitor = Monitor(tmp_path, live=False); assert len(monitor.charts) == len(charts_of(keys + ['temperature', 'seconds_per_step'], True))
    times = []
    for v in (.1, .2, .3): start = time.perf_counter(); monitor.smooth.value = v; times.append(time.perf_counter() - start)
    print('smoothing moved:', [round(1000*t) for t in times], 'ms'); assert min(times) < 2


CELLS = '''
import asyncio, json, os
from pathlib import Path
from vlwb.widgets.monitor import Monitor
folder = Path({folder!r})
monitor = Monitor(folder, every=.3)
monitor
'''


@pytest.mark.parametrize('where', ['lab', 'voila'])
def test_in_the_browser(where, request, tmp_path):
    "A log that grows is drawn while it grows; runs, axis and smoothing by keyboard; markup in a run's name is text."
    open_page, folder = request.getfixturevalue(where), tmp_path/'runs'
    for name, f in (('srcl', 1.), ('<script>alert(1)</script>', 1.4)): write(folder/name, *(dict(step=k, seconds=k/5, loss=f*3/k**.5 + .05*(k % 3), contrast=f/k, lr=1e-3, logit_scale=15.+k/9, alpha=1-k/60, **({'val_R@1': 30 + k/3} if k % 10 == 0 else {})) for k in range(1, 41)))
    page = open_page([CELLS.format(folder=str(folder)), browser.watch('monitor.state', ['revision', 'chosen', 'x', 'smooth', 'live'], tmp_path/'state.json')])
    p = page.page; p.locator('.vlwb-monitor .vlwb-chart path.line').first.wait_for(state='attached'); p.wait_for_timeout(800)
    assert browser.wait_state(tmp_path/'state.json')['live'] and p.get_by_text('<script>alert(1)</script>').count() > 0
    first = p.locator('.vlwb-monitor .vlwb-chart').first; drawn = first.locator('path.line').first.get_attribute('d')
    before = browser.wait_state(tmp_path/'state.json')['revision']
    write(folder/'srcl', *(dict(step=k, seconds=k/5, loss=9., lr=1e-3) for k in range(41, 60)))
    browser.wait_state(tmp_path/'state.json', lambda s: s['revision'] > before); p.get_by_text('step 59').first.wait_for()
    p.wait_for_function('d => document.querySelector(".vlwb-monitor .vlwb-chart path.line").getAttribute("d") !== d', arg=drawn)
    page.slide('.vlwb-monitor .widget-slider', 5)
    assert browser.wait_state(tmp_path/'state.json', lambda s: abs(s['smooth'] - .1) < 1e-6)
    p.get_by_role('button', name='seconds of training').click(); assert browser.wait_state(tmp_path/'state.json', lambda s: s['x'] == 'seconds')
    p.get_by_text('seconds of training').nth(1).wait_for(state='attached')
    p.get_by_role('button', name='Watching').click(); assert browser.wait_state(tmp_path/'state.json', lambda s: not s['live'])
    p.get_by_text('not watching').wait_for()
    p.locator('.vlwb-monitor select[multiple]').focus(); p.keyboard.press('Home'); assert len(browser.wait_state(tmp_path/'state.json', lambda s: len(s['chosen']) == 1)['chosen']) == 1
    p.wait_for_timeout(500); page.shot(open_page.shots/f'monitor-{where}.png')


def test_dark_theme_and_hover(lab, tmp_path):
    write(tmp_path/'run', *(dict(step=k, seconds=k/5, loss=3/k, hardness=.5, synthetic_hardness=.6, weight_auroc=.5+k/80) for k in range(1, 25)))
    page = lab([CELLS.format(folder=str(tmp_path/'run'))], dark=True); p = page.page
    p.locator('.vlwb-monitor .vlwb-chart path.line').first.wait_for(state='attached'); p.wait_for_timeout(1200)
    dot = p.locator('.vlwb-monitor .vlwb-chart').first.locator('.dot').nth(3); dot.hover(force=True)
    hint = p.get_by_text('run, loss'); hint.wait_for(timeout=5000); assert hint.locator('xpath=..').inner_text().split()[-1] == '0.75'
    page.shot(lab.shots/'monitor-dark.png')


def test_in_the_browser_a_cell_that_runs_again_leaves_no_second_task(lab, tmp_path):
    "The browser says that the old view is gone: its task ends, the new one looks."
    write(tmp_path/'run', *(dict(step=k, seconds=k/5, loss=3/k) for k in range(1, 25)))
    page = lab([CELLS.format(folder=str(tmp_path/'run')).replace('monitor = ', 'all = [*globals().get("all", []), Monitor(folder, every=.3)]; monitor = all[-1] #')]); p = page.page
    p.locator('.vlwb-monitor .vlwb-chart path.line').first.wait_for(state='attached')
    p.locator('.jp-CodeCell').first.click(); p.keyboard.press('Escape'); p.keyboard.press('Control+Enter')
    for _ in range(40):
        live = page.ask('[(m.live.value, m.widget._view_count) for m in all]')
        if [tuple(x) for x in live] == [(False, 0), (True, 1)]: break
        p.wait_for_timeout(250)
    assert [tuple(x) for x in live] == [(False, 0), (True, 1)]
