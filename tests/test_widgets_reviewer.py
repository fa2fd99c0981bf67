"The audit reviewer: its log under kills and two writers, its state and controls, a real audit before it, training and judging after it, and itself in a browser."
import json, os, signal, subprocess, sys, time
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import traitlets as T
from hypothesis import given, strategies as st
from vlwb.core import data_folder, make_generator
from vlwb.data.pairs import Pairs, read_pairs
from vlwb.data.relevance import read_matches
from vlwb.negatives.audit import write_suspects
from vlwb.widgets.gallery import Gallery
from vlwb.widgets.reviewer import Reviewer, ReviewerState, VerdictLog, read_suspects, review_precision, suspect_page
from vlwb.bench import browser

COLOURS = ['red', 'green', 'blue', 'white']
TEXTS = ['<script>alert(1)</script>', 'قطة تنام على السرير', 'long ' * 300, 'a <b>bold</b> cat']


def make_audit(folder, n=4):
    "n plain pictures with two captions each, and 2n suspects in falling order of score."
    pixels = np.stack([np.full((60, 80, 3), (60*i % 256, 200, 255 - 50*i % 256), np.uint8) for i in range(n)])
    texts = [t for i in range(n) for t in (f'a picture of {COLOURS[i % 4]}', TEXTS[i % 4])]
    pairs = Pairs.from_arrays(pixels, texts, np.repeat(np.arange(n), 2), image_ids=[f'i{k}' for k in range(n)], caption_ids=[f'c{k}' for k in range(2*n)], source='plain')
    rows = [dict(image_id=f'i{(k//2 + 1 + k % 2) % n}', caption_id=f'c{k}', caption=texts[k], caption_image_id=f'i{k//2}', score=round(.9 - .01*k, 3), why='near <i>that</i>') for k in range(2*n)]
    write_suspects(folder/'suspects.jsonl', rows)
    return pairs


@pytest.fixture
def audit(tmp_path): return tmp_path, make_audit(tmp_path)


def lines(folder): return [json.loads(l) for l in (folder/'verdicts.jsonl').read_text().splitlines() if l]


# ---- the log -------------------------------------------------------------------------------------------------------------------------------
WRITER = '''
import sys
from vlwb.widgets.reviewer import VerdictLog
log = VerdictLog(sys.argv[1]); print('ready', flush=True); sys.stdin.readline()
for k in range(int(sys.argv[3])): log.append([dict(image_id=sys.argv[2], caption_id=str(k), verdict='match', why='x'*300)])
'''

def test_two_reviewers_lose_no_line(tmp_path):
    path = tmp_path/'verdicts.jsonl'
    writers = [subprocess.Popen([sys.executable, '-c', WRITER, str(path), name, '60'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in 'ab']
    for w in writers: w.stdout.readline()
    for w in writers: w.stdin.write('go\n'); w.stdin.flush()
    for w in writers: assert w.wait(60) == 0; w.stdout.close(); w.stdin.close()
    log = VerdictLog(path)
    assert len(log.lines) == 120 and log.lost == 0 and not log.torn
    assert {(r['image_id'], r['caption_id']) for r in log.lines} == {(n, str(k)) for n in 'ab' for k in range(60)}


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path/'verdicts.jsonl'
    writer = subprocess.Popen([sys.executable, '-c', WRITER, str(path), 'a', '100000'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    writer.stdout.readline(); writer.stdin.write('go\n'); writer.stdin.flush()
    while not path.exists() or path.stat().st_size < 5000: time.sleep(.01)
    writer.send_signal(signal.SIGKILL); writer.wait(); writer.stdout.close(); writer.stdin.close()
    log = VerdictLog(path)
    assert [int(r['caption_id']) for r in log.lines] == list(range(len(log.lines))) and len(log.lines) > 10 and log.lost + log.torn == 0


@pytest.mark.skipif(os.name != 'posix', reason='file size limits are POSIX')
def test_half_a_line_on_a_full_disk_is_an_error_and_survived(audit):
    folder, pairs = audit
    code = '''
import resource, signal, sys
from vlwb.widgets.reviewer import Reviewer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
view = Reviewer(sys.argv[1]); view.press('match'); view.state.show = 'all'
size = view.state.log.path.stat().st_size; resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
view.press('no match')
assert view.desk.page['failed'] and view.desk.page['status'].startswith('NOT SAVED'), view.desk.page['status']
assert view.state.counts()['no match'] == 0 and view.state.at == 1 and view.desk.page['counts']['match'] == 1
'''
    done = subprocess.run([sys.executable, '-c', code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torn = (folder/'verdicts.jsonl').read_bytes(); assert not torn.endswith(b'\n') and len(torn.splitlines()) == 2
    with pytest.warns(UserWarning, match='cannot be read'): assert read_matches(folder/'verdicts.jsonl', pairs).matches.nnz == 1
    view = Reviewer(folder, pairs)
    assert view.state.log.torn and 'cannot be read' in view.desk.page['status'] and view.state.counts()['open'] == 7
    view.press('unsure')
    assert (folder/'verdicts.jsonl').read_bytes().startswith(torn + b'\n') and view.state.verdicts[:2] == ['match', 'unsure']      # nothing was rewritten
    assert VerdictLog(folder/'verdicts.jsonl').lost == 1


def test_every_verdict_is_on_disk_before_the_next_suspect_shows(audit):
    folder, pairs = audit
    view, seen = Reviewer(folder, pairs, reviewer='Ada\n'), []
    view.state.observe(lambda c: seen.append((c.new, len(lines(folder)))), 'at')
    for answer in ('match', 'no match', 'unsure'): view.press(answer)
    assert seen == [(1, 1), (2, 2), (3, 3)]
    first = lines(folder)[0]
    assert {k: first[k] for k in ('image_id', 'caption_id', 'verdict', 'score', 'drawn', 'reviewer')} == dict(image_id='i1', caption_id='c0', verdict='match', score=.9, drawn='score', reviewer='Ada') and first['time'].endswith('+00:00')
    before = (folder/'verdicts.jsonl').read_bytes(); view.press('undo')
    assert (folder/'verdicts.jsonl').read_bytes().startswith(before) and lines(folder)[-1]['undo'] and view.state.at == 2
    quiet = Reviewer(folder, pairs, timed=False); quiet.press('match'); assert not {'time', 'reviewer'} & set(lines(folder)[-1])
    assert view.state.verdicts[2] == 'open' and (view.state.refresh(), view.state.verdicts[2])[1] == 'match'        # what another session wrote


def test_a_log_that_was_moved_away_or_replaced(audit):
    folder, pairs = audit
    state = Reviewer(folder, pairs).state; state.judge('match'); state.judge('match')
    (folder/'verdicts.jsonl').rename(folder/'old.jsonl'); state.refresh(); assert state.counts()['open'] == 8
    state.judge('no match'); assert len(lines(folder)) == 1 and state.counts() == {'match': 0, 'no match': 1, 'unsure': 0, 'open': 7, 'all': 8}
    state.undo(); state.undo(); assert 'somebody else' in state.message                 # the lines of the old file do not stand any more
    (folder/'new.jsonl').write_text((folder/'old.jsonl').read_text()); os.replace(folder/'new.jsonl', folder/'verdicts.jsonl'); state.refresh()
    assert state.counts()['match'] == 2


def test_numbers_as_ids_and_pairs_of_other_lists(audit):
    folder, pairs = audit
    (folder/'verdicts.jsonl').write_text('{"image_id": 7, "caption_id": 8, "verdict": "match", "time": "x"}\n{"verdict": "match"}\n[]\n\n{"image_id": "i1", "caption_id": "c0", "verdict": "perhaps"}\n')
    state = Reviewer(folder, pairs).state
    assert state.outside == {('7', '8')} and state.log.lost == 3 and state.counts()['open'] == 8 and '3 cannot be read' in state.message


# ---- precision -----------------------------------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.sampled_from(['match', 'no match', 'unsure', 'open']), st.booleans()), max_size=40), st.sampled_from([.8, .95, .99]))
def test_precision_is_a_share_inside_its_interval(rows, level):
    p = review_precision([v for v, _ in rows], [r for _, r in rows], level)
    for share, low, high in ((p.share, p.low, p.high), (p.list_share, p.list_low, p.list_high)):
        assert np.isnan([share, low, high]).all() or 0 <= low <= share + 1e-12 and share <= high + 1e-12 and high <= 1 + 1e-12
    assert np.isnan(p.share) == (p.settled == 0) and np.isnan(p.list_share) == (p.drawn == 0) and p.text
    if p.settled == p.total and p.drawn: assert p.list_low == pytest.approx(p.list_high) == pytest.approx(p.share)


def test_a_sample_that_was_begun_by_score_is_not_biased():
    "The first 20 judged by score, 30 more at random: the mean of the estimates is the truth, unlike the plain share."
    truth = np.arange(100) < 40; rng = np.random.default_rng(0); plain, whole, held = [], [], 0
    for _ in range(300):
        judged = np.zeros(100, bool); judged[:20] = True; drawn = rng.permutation(np.arange(20, 100))[:30]; judged[drawn] = True
        p = review_precision(np.where(judged, np.where(truth, 'match', 'no match'), 'open'), np.isin(np.arange(100), drawn))
        plain.append(p.share); whole.append(p.list_share); held += p.list_low <= .4 <= p.list_high
    assert abs(np.mean(whole) - .4) < .01 and np.mean(plain) > .5 and held/300 > .92


# ---- state and controls --------------------------------------------------------------------------------------------------------------------
def test_filters_orders_and_jumps(audit):
    folder, pairs = audit
    s = Reviewer(folder, pairs, seed=1).state
    for answer in ('match', 'no match', 'match'): s.judge(answer)
    s.show = 'match'; assert s.shown() == [0, 2] and s.at in (0, 2)
    s.at = 0; s.judge('unsure'); assert s.at == 2 and s.shown() == [2]
    s.judge('unsure'); assert s.at == -1 and s.message.startswith('Saved')
    s.undo(); assert (s.at, s.show, s.verdicts[2]) == (2, 'match', 'match')
    s.next_open(); assert (s.at, s.show) == (3, 'all')
    s.order = 'random'; walked = [s.at]
    while len(walked) < 5: s.judge('match'); walked.append(s.at)
    assert walked == [k for k in s.sequence() if k >= 3] and s.sequence() != list(range(8))
    s.show = 'open'; s.judge('match'); assert s.at == -1 and 'All suspects are judged' in s.message
    s.next_open(); assert s.message == 'No suspect is open: all are judged.'
    assert s.precision.drawn == 5 and 'nothing is left to estimate' not in s.precision.text         # one is unsure
    with pytest.raises(T.TraitError): s.order = 'alphabet'
    with pytest.raises(T.TraitError): s.level = 1.


def test_resumes_where_it_stopped(audit):
    folder, pairs = audit
    a = Reviewer(folder, pairs, order='random'); a.press('match'); a.press('no match')
    b = Reviewer(folder, pairs, order='random')
    assert b.state.at == a.state.at and b.state.verdicts == a.state.verdicts and b.state.precision == a.state.precision and b.desk.page['status'].startswith('2 of 8 are judged already')
    assert not b.desk.page['can_undo']
    b.press('undo'); assert 'this session' in b.desk.page['status']


def test_controls_and_state_agree(audit):
    folder, pairs = audit
    view = Reviewer(folder, pairs)
    view.order.value = 'random'; assert view.state.order == 'random' and 'random order' in view.desk.page['title']
    view.state.order = 'score'; assert view.order.value == 'score'
    view.show.value = 'unsure'; assert view.desk.page['at'] == -1 and view.desk.page['empty'] == 'No suspect was judged "unsure".' and view.desk.photo == b''
    view.state.show = 'all'; assert view.show.value == 'all' and view.desk.page['at'] == 0 and view.desk.photo[:2] == b'\xff\xd8' == view.desk.owner_photo[:2]
    view.name.value = 'Zoë'; view.press('match'); assert lines(folder)[-1]['reviewer'] == 'Zoë'
    picture = view.desk.photo; view.press('forward'); view.press('back'); assert view.desk.page['at'] == 1 and view.desk.page['counts']['match'] == 1
    assert view.desk.photo == picture
    view.desk.pressed = dict(n=99, action='no match', at=0); assert len(lines(folder)) == 1 and 'not counted' in view.desk.page['status']
    assert {'image/png', 'text/plain'} <= set(view._repr_mimebundle_()) and 'Caption' in view.figure().alt


def test_another_reviewer_is_seen_and_reported(audit):
    folder, pairs = audit
    ada, bo = Reviewer(folder, pairs, reviewer='Ada'), Reviewer(folder, pairs, reviewer='Bo')
    ada.press('match'); bo.press('no match')                                        # of the same suspect
    assert bo.state.verdicts[0] == 'no match' and 'Somebody else had said match' in bo.desk.page['status']
    ada.press('match'); report = ada.report()
    assert report.what.tolist() == ['judged', 'last said by Bo', 'last said by Ada', 'whole list, estimated'] and report.suspects.tolist() == [2, 1, 1, 8]
    assert ada.state.table().reviewer[:2].tolist() == ['Bo', 'Ada'] and ada.state.table().reviewer.isna().sum() == 6


def test_bad_cases(tmp_path):
    pairs = make_audit(tmp_path)
    gone = Pairs(pairs.image_ids, pairs.captions, pairs.caption_ids, pairs.caption_image, [tmp_path/f'{i}.jpg' for i in pairs.image_ids])
    view = Reviewer(tmp_path, gone); assert view.desk.photo == b'' and 'cannot be read' in view.desk.page['missing']; view.press('match'); view.figure()
    gallery = Gallery(pairs, F.normalize(torch.randn(4, 3, generator=make_generator(0)), dim=1), F.normalize(torch.randn(8, 3, generator=make_generator(1)), dim=1), attribution={'i2': 'somebody, CC BY'})
    view = Reviewer(tmp_path, gallery); assert view.desk.page['owner_credit'] == '' and view.desk.page['caption'] == TEXTS[0]
    view.state.at = 2; assert view.desk.page['credit'] == 'somebody, CC BY'
    with open(tmp_path/'suspects.jsonl', 'a') as f: f.write('{"image_id": "i0"}\n')
    assert 'needs' in Reviewer(tmp_path, pairs).desk.page['status']
    with pytest.raises(ValueError, match='needs'): Reviewer(tmp_path, pairs, on_error='raise')
    one = tmp_path/'one'; write_suspects(one/'suspects.jsonl', [dict(image_id='i0', caption_id='c7')])
    view = Reviewer(one, pairs); assert view.desk.page['caption'] == TEXTS[3] and view.desk.page['owner_id'] == 'i3' and view.desk.page['score'] == 'no score'
    view.press('match'); assert view.state.at == 0 and 'All suspects are judged' in view.desk.page['status'] and view.state.precision.text.endswith('nothing is left to estimate.')
    assert json.dumps(suspect_page(view.state)) and len(read_suspects(one/'suspects.jsonl')[0]) == 1


# ---- before and after ----------------------------------------------------------------------------------------------------------------------
def test_from_an_audit_to_training_and_judging(tmp_path):
    from vlwb.data.toy import hidden_matches
    from vlwb.train.loop import TrainConfig
    from vlwb.train.recipe import Recipe
    from vlwb.train.objectives import LossConfig
    from vlwb.workflows import InputConfig, audit_pairs, eval_pairs, read_known, read_relevance, read_set, train_pairs
    toy = hidden_matches(groups=8, each=3, captions=2)
    np.savez(tmp_path/'f.npz', image_features=toy.images.numpy(), text_features=toy.texts.numpy(), caption_image=np.asarray(toy.caption_image))
    audit_pairs(tmp_path/'f.npz', tmp_path/'audit', count=20)
    data = read_set(tmp_path/'f.npz'); view = Reviewer(tmp_path/'audit', data.pairs())
    assert view.state.counts()['open'] == 20 and 'pictures' not in view.desk.page['caption']
    for k in range(9): view.press(('match', 'no match', 'unsure')[k % 3])
    view.press('undo'); view.press('unsure')                                        # the last of them, taken back and given again
    log = tmp_path/'audit'/'verdicts.jsonl'
    with open(log, 'ab') as f: f.write(b'{"image_id"')
    with pytest.warns(UserWarning, match='1 of its lines'): known = read_known(log, data)
    assert known.matches.nnz == 3 and known.known.nnz == 6 and read_relevance(log, data.pairs()).matches.nnz == 3
    train_pairs(tmp_path/'f.npz', tmp_path/'run', Recipe(LossConfig(), TrainConfig(steps=2, device='cpu'), 0), InputConfig(), known=log, batch_size=8)
    assert eval_pairs(tmp_path/'run', tmp_path/'f.npz', relevance=(str(log),), progress=False)['further matches'] == 3
    before = {(r['image_id'], r['caption_id']) for r in read_suspects(tmp_path/'audit')[0]}
    audit_pairs(tmp_path/'f.npz', tmp_path/'again', count=20, known=log)
    settled = {(r['image_id'], r['caption_id']) for r in view.state.log.lines if r['verdict'] in ('match', 'no match')}
    assert settled < before and not settled & {(r['image_id'], r['caption_id']) for r in read_suspects(tmp_path/'again')[0]}


def test_a_real_audit_of_photos(tmp_path):
    from vlwb.models.frozen import have_pretrained
    if data_folder() is None or not have_pretrained(): pytest.skip('needs VLWB_DATA and the pretrained extra')
    from vlwb.workflows import audit_pairs, read_known
    source = data_folder()/'coco_mini/images.jsonl'
    audit_pairs(source, tmp_path, split='val', count=12)
    pairs = read_pairs(source, split='val'); view = Reviewer(tmp_path, pairs, order='random')
    assert view.desk.photo[:2] == b'\xff\xd8' and len(view.desk.page['own']) == 5 and view.desk.page['why'].startswith('reads like')
    view.press('match'); view.press('no match')
    assert read_known(tmp_path/'verdicts.jsonl', pairs).known.nnz == 2 and read_known(tmp_path/'verdicts.jsonl', read_pairs(source, split='test'), split='test').known.nnz == 0


# ---- in a browser --------------------------------------------------------------------------------------------------------------------------
def cells(folder):
    return [f'import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nfrom pathlib import Path\nfrom test_widgets_reviewer import make_audit\nfrom vlwb.widgets.reviewer import Reviewer\nfolder = Path({str(folder)!r}); view = Reviewer(folder, make_audit(folder))',
            browser.watch('view.state', ['at', 'order', 'show', 'changes', 'reviewer', 'message'], folder/'state.json'), 'view']


@pytest.mark.parametrize('where', ['lab', 'voila'])
def test_reviewing_by_keyboard_and_button(where, request, tmp_path):
    open_page = request.getfixturevalue(where); page = open_page(cells(tmp_path)); p = page.page
    desk, state = p.locator('.vlwb-desk'), lambda fits: browser.wait_state(tmp_path/'state.json', fits)
    desk.locator('.left img').wait_for(); first = desk.locator('.left img').get_attribute('src')
    desk.locator('.caption').click(); p.keyboard.press('m'); state(lambda s: s['at'] == 1); p.locator('.vlwb-desk[data-at="1"]').wait_for()
    assert desk.locator('.left img').get_attribute('src') != first
    assert desk.locator('.caption').inner_text() == TEXTS[0] and desk.locator('.caption b, .caption script').count() == 0 and '<i>that</i>' in desk.inner_text()
    for key, at in (('n', 2), ('U', 3)): p.keyboard.press(key); p.locator(f'.vlwb-desk[data-at="{at}"]').wait_for()
    assert [r['verdict'] for r in lines(tmp_path)] == ['match', 'no match', 'unsure']
    p.keyboard.press('z'); p.locator('.vlwb-desk[data-at="2"][data-verdict=open]').wait_for()
    desk.get_by_role('button', name='Match', exact=False).first.click(); p.locator('.vlwb-desk[data-at="3"]').wait_for()
    p.keyboard.press('ArrowLeft'); p.locator('.vlwb-desk[data-at="2"][data-verdict=match]').wait_for()          # the button has the focus; letters still work
    assert desk.locator('button[data-action=match]').get_attribute('aria-pressed') == 'true'
    p.keyboard.press('o'); p.locator('.vlwb-desk[data-at="3"]').wait_for()
    p.keyboard.down('m'); p.keyboard.down('m'); p.keyboard.down('m'); p.keyboard.up('m'); state(lambda s: s['at'] == 4); p.wait_for_timeout(300)
    assert len(lines(tmp_path)) == 6                                                 # held down: one verdict
    p.keyboard.type('ddxjk'); p.keyboard.press('Escape')                             # JupyterLab's own letters stay out
    if where == 'lab': assert p.evaluate('window.jupyterapp.shell.currentWidget.content.widgets.map(c => c.model.type)') == ['code']*3
    p.get_by_placeholder('optional').fill(''); p.get_by_placeholder('optional').press_sequentially('mnu Ada'); p.keyboard.press('Enter'); state(lambda s: s['reviewer'] == 'mnu Ada')
    assert len(lines(tmp_path)) == 6
    p.locator('.widget-dropdown select').first.select_option(label='random order: an unbiased sample'); state(lambda s: s['order'] == 'random')
    desk.focus(); p.keyboard.press('m'); state(lambda s: s['message'].startswith('Saved')); desk.get_by_text('from 1 drawn at random').wait_for()
    assert lines(tmp_path)[-1]['drawn'] == 'random' and lines(tmp_path)[-1]['reviewer'] == 'mnu Ada'
    page.shot(open_page.shots/f'reviewer-{where}.png')
    p.locator('.widget-dropdown select').nth(1).select_option(label='judged: no match'); state(lambda s: s['show'] == 'no match'); assert desk.get_attribute('data-at') == '1' or p.locator('.vlwb-desk[data-at="1"]').wait_for() is None
    desk.locator('button[data-action=match]').click(); desk.get_by_text('No suspect', exact=True).wait_for(); assert desk.locator('button[data-action=match]').is_disabled()


@pytest.mark.parametrize('where', ['lab', 'voila'])
def test_dark_and_narrow(where, request, tmp_path):
    open_page = request.getfixturevalue(where); page = open_page(cells(tmp_path), dark=True, size=(700, 1100)); p = page.page
    p.locator('.vlwb-desk .left img').wait_for(); desk = p.locator('.vlwb-desk'); desk.focus()
    for key, at in (('n', 1), ('m', 2), ('u', 3)): p.keyboard.press(key); p.locator(f'.vlwb-desk[data-at="{at}"]').wait_for()
    p.keyboard.press('ArrowRight'); p.locator('.vlwb-desk[data-at="4"]').wait_for(); p.keyboard.press('ArrowRight'); p.locator('.vlwb-desk[data-at="5"]').wait_for()
    assert desk.locator('.caption').inner_text().startswith('long long') and desk.evaluate('e => e.scrollWidth <= e.clientWidth + 1')
    page.shot(open_page.shots/f'reviewer-{where}-dark.png')


def test_a_verdict_is_fast(lab, tmp_path):
    page = lab(cells(tmp_path)); page.page.locator('.vlwb-desk .left img').wait_for()
    found = page.time_change('.vlwb-desk', '.vlwb-desk', key='m', attribute='data-at', times=7)
    middle = sorted(f['frame'] for f in found)[3]; print(f'a verdict: {middle:.0f} ms to the next suspect on the screen'); assert middle < 600
