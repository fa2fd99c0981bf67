"""Reports and plots: escaping, self-containment, alternative texts, edge cases, and one look in a real browser."""
import io, json, re, shutil, threading, warnings
from html.parser import HTMLParser
from pathlib import Path
import matplotlib as mpl
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from vlwb.viz import plots as P
from vlwb.bench.browser import FLAGS, browser_missing, find_chromium
from vlwb.viz.report import Plate, Table, plain, thumbnail, write_audit, write_report

NASTY = '<script>alert("x")</script> & \'quotes\' "><img src=x onerror=alert(1)> $5 {{ 7*7 }}'
RIGHT_TO_LEFT = 'שלושה ריבועים כחולים ליד עיגול'

class Seen(HTMLParser):
    "What a page loads, links to, shows as text and leaves without alternative text."
    def __init__(self, page):
        super().__init__(); self.tags, self.loads, self.links, self.alts, self.ids, self.text, self.inside = [], [], [], [], [], [], []
        self.feed(page)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs); self.tags.append(tag); self.inside.append(tag)
        self.loads += [v for k, v in attrs if k in ('src', 'srcset', 'data', 'poster', 'action', 'background', 'formaction')] + ([a['href']] if tag == 'link' else [])
        assert not [k for k in a if k.startswith('on')], f'event handler on {tag}'
        if 'id' in a: self.ids.append(a['id'])
        if tag == 'a': self.links.append(a['href'])
        if tag == 'img': self.alts.append(a.get('alt'))
    def handle_data(self, data): self.text.append(data)
    @property
    def words(self): return ' '.join(self.text)

def check_page(page):
    seen = Seen(page)
    assert all(v.startswith('data:image/') for v in seen.loads), [v[:60] for v in seen.loads if not v.startswith('data:image/')]
    assert not {'script', 'iframe', 'object', 'embed', 'link', 'base', 'form'} & set(seen.tags)
    assert all(seen.alts) and len(set(seen.ids)) == len(seen.ids)
    assert all(l.startswith('#') and l[1:] in seen.ids for l in seen.links)
    assert "default-src 'none'" in page and not re.search(r'url\(|@import', page.split('</style>')[0])
    assert page.startswith('<!doctype html>') and 'lang="en"' in page and 'prefers-color-scheme: dark' in page
    return seen

def picture(): return P.plot_similarity(np.eye(3), np.eye(3), title='three')

def make_report(folder, **more):
    given = dict(summary=[NASTY, 'second'], headline=[(NASTY, 1.5, NASTY)], tables=[Table(NASTY, [{NASTY: NASTY, 'value': .25}, {NASTY: 'b', 'value': float('nan')}], NASTY)],
        figures=[Plate(picture(), NASTY, NASTY, NASTY), Plate(picture(), 'own alt')], notes=[NASTY], next_step=NASTY)
    return write_report(folder, NASTY, **(given | more))

def make_audit(folder, **more):
    rows = [dict(image_id=NASTY, caption_id=NASTY, caption=NASTY, caption_image_id='b', score=.9, why=NASTY), dict(image_id='b', caption_id=3, caption=RIGHT_TO_LEFT, caption_image_id=None, score=.8, why=dict(text=.7)), dict(image_id='gone', caption_id=4, caption='word '*900, caption_image_id=NASTY, score=float('nan'))]
    def load(key):
        if key == 'gone': raise OSError(NASTY)
        return Image.new('RGBA', (300, 120), (1, 99, 200, 128)) if key == 'b' else None
    return write_audit(folder, rows, **(dict(load_image=load, captions_of=lambda key: [NASTY, RIGHT_TO_LEFT], attribution={'b': NASTY}, summary=NASTY, tables=[Table('rates', [])]) | more))

def test_report_escapes_everything_and_loads_nothing(tmp_path):
    page = make_report(tmp_path).read_text('utf-8'); seen = check_page(page)
    assert seen.words.count('<script>alert("x")</script>') >= 9 and seen.alts[0].startswith('<script>alert') and '{{ 7*7 }}' in seen.words
    assert seen.tags.count('img') == 2 and seen.tags.count('table') == 1 and seen.tags.count('source') == 2
    assert seen.alts[1] == 'Similarity matrix of 3 images and 3 captions, from 0.00 to 1.00; 3 own positives marked.'
    assert 'scope="col"' in page and 'scope="row"' in page and 'class="skip" href="#content"' in page

def test_metrics_are_strict_json(tmp_path):
    make_report(tmp_path, metrics=dict(rsum=np.float32(1.5), recall=torch.tensor([1., float('nan')]), n=np.int64(3), nested=dict(path=Path('a')), broken='a\ud800'))
    numbers = json.loads((tmp_path/'metrics.json').read_text('utf-8'), parse_constant=lambda c: pytest.fail(c))
    assert numbers == dict(rsum=1.5, recall=[1., None], n=3, nested=dict(path='a'), broken='a?')
    make_report(tmp_path)
    assert json.loads((tmp_path/'metrics.json').read_text('utf-8')) == {P.clean_text(NASTY): [{NASTY: NASTY, 'value': .25}, {NASTY: 'b', 'value': None}]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ['metrics.json', 'report.html']

def test_report_takes_frames_and_nothing(tmp_path):
    import pandas as pd
    page = write_report(tmp_path, 'Empty').read_text('utf-8'); check_page(page)
    assert '<nav' not in page and json.loads((tmp_path/'metrics.json').read_text()) == {}
    page = write_report(tmp_path, 'Frame', tables=[Table('t', pd.DataFrame(dict(a=[1, 2], b=['x', None])))]).read_text('utf-8')
    assert Seen(page).tags.count('tr') == 3
    with pytest.raises(ValueError, match='no alternative text'): write_report(tmp_path, 't', figures=[Plate(mpl.figure.Figure(), 'silent')])
    with pytest.raises(ValueError, match='needs label and value'): write_report(tmp_path, 't', headline=[('only',)])

def test_audit_escapes_and_survives_missing_pictures(tmp_path):
    page = make_audit(tmp_path).read_text('utf-8'); seen = check_page(page)
    assert seen.tags.count('article') == 3 and seen.words.count('<script>alert("x")</script>') >= 9
    assert 'The picture cannot be read' in seen.words and 'No picture at hand' in seen.words and 'outside this set' in seen.words and 'This table has no rows.' in seen.words
    assert f'dir="auto">{RIGHT_TO_LEFT}</p>' in page and 'None' not in seen.words
    assert all(v.startswith('data:image/jpeg') for v in seen.loads)
    assert 'word word…' in make_audit(tmp_path).read_text('utf-8')

def test_audit_limit_and_errors(tmp_path):
    row = dict(image_id=1, caption_id=1, caption='c', caption_image_id=2, score=1)
    page = write_audit(tmp_path, [row]*7, limit=3).read_text('utf-8')
    assert Seen(page).tags.count('article') == 3 and 'first 3 of 7 suspects' in page
    with pytest.raises(ValueError, match='suspect 1 lacks caption_image_id, score'): write_audit(tmp_path, [row, dict(image_id=1, caption_id=1, caption='c')])

def test_thumbnail_keeps_proportions_and_drops_metadata():
    photo = Image.new('RGB', (100, 400)); exif = photo.getexif(); exif[0x010e] = 'a secret'
    out = io.BytesIO(); photo.save(out, 'JPEG', exif=exif)
    uri, width, height = thumbnail(Image.open(out), 200)
    import base64
    data = base64.b64decode(uri.split(',')[1])
    assert (width, height) == (50, 200) and b'a secret' not in data and len(Image.open(io.BytesIO(data)).getexif()) == 0

B = np.random.default_rng(0).random((6, 6))
M = B > .6
CASES = { # each edge case of each plot, as a call
    'similarity 1': lambda: P.plot_similarity([[.5]], [[True]], image_labels=['a'], text_labels=[NASTY], images=[None]),
    'similarity empty': lambda: P.plot_similarity(np.zeros((0, 3))),
    'similarity all nan': lambda: P.plot_similarity(np.full((3, 4), np.nan), own=np.zeros((3, 4))),
    'similarity inf': lambda: P.plot_similarity([[np.inf, 1.], [0., -np.inf]]),
    'similarity row': lambda: P.plot_similarity(np.random.rand(1, 300), title=NASTY*3),
    'similarity column': lambda: P.plot_similarity(np.random.rand(300, 1), false_negatives=np.ones((300, 1))),
    'similarity labels': lambda: P.plot_similarity(B, M, ~M, image_labels=[RIGHT_TO_LEFT]*6, text_labels=[NASTY*20]*6, images=[B]*6, title=NASTY),
    'similarity tensor': lambda: P.plot_similarity(torch.rand(4, 4, requires_grad=True), torch.eye(4, dtype=torch.bool)),
    'weights 1': lambda: P.plot_weights([[1.]], [[True]]),
    'weights all removed': lambda: P.plot_weights(np.zeros((3, 3)), np.eye(3)),
    'weights wide': lambda: P.plot_weights([[1e-30, 1e30]], false_negatives=[[1, 0]]),
    'weights empty': lambda: P.plot_weights(np.zeros((3, 0))),
    'histogram no truth': lambda: P.plot_weight_histogram(B),
    'histogram empty': lambda: P.plot_weight_histogram([]),
    'histogram constant': lambda: P.plot_weight_histogram(np.ones((40, 40)), np.eye(40), auroc=.5),
    'histogram zeros': lambda: P.plot_weight_histogram(np.zeros((4, 4)), false_negatives=np.eye(4)),
    'histogram groups': lambda: P.plot_weight_histogram(B, np.eye(6), M, ~M, M),
    'split nan': lambda: P.plot_split([np.nan, .5], label=NASTY),
    'curves none': lambda: P.plot_training_curves({}),
    'curves one': lambda: P.plot_training_curves({NASTY: [dict(step=0, loss=1.)]}),
    'curves nan': lambda: P.plot_training_curves({'a': [dict(step=i, loss=float('nan')) for i in range(50)]}),
    'curves seven': lambda: P.plot_training_curves({str(i): [dict(step=s, loss=i+s, b=s) for s in range(40)] for i in range(8)}, ('loss', 'b', 'c', 'step')),
    'topk none': lambda: P.plot_topk([], {'a': []}),
    'topk empty lists': lambda: P.plot_topk(['q'], {'a': [[]]}),
    'topk text': lambda: P.plot_topk([None, B], {NASTY: [[NASTY*30, RIGHT_TO_LEFT], ['b']], 'B': [['c'], []]}, {NASTY: [[True, None], [False]]}, {NASTY: [[.5, np.nan], [.2]], 'B': [[.1], []]}),
    'topk images': lambda: P.plot_topk([NASTY*9, ''], {'a': [[B, None], [B]]}),
    'grid one': lambda: P.plot_image_grid([None]),
    'grid captions': lambda: P.plot_image_grid([B]*7, [NASTY*9]*7, [True, False, None]*2 + [True], columns=3, title=NASTY),
    'grid none': lambda: P.plot_image_grid([]),
    'intervals none': lambda: P.plot_metric_intervals([]),
    'intervals nan': lambda: P.plot_metric_intervals([dict(metric='a', method='b', mean=float('nan'))]),
    'intervals one': lambda: P.plot_metric_intervals([dict(metric=NASTY, method=NASTY, mean=1., low=None, high=2., condition=NASTY)], title=NASTY),
    'scatter none': lambda: P.plot_scatter([], []),
    'scatter constant': lambda: P.plot_scatter(np.ones(20), np.ones(20), spearman=float('nan')),
    'scatter many': lambda: P.plot_scatter(np.random.rand(6000), np.random.rand(6000)),
    'detection one kind': lambda: P.plot_detection([1., 2.], [True, True]),
    'detection none': lambda: P.plot_detection({}, []),
    'detection nan': lambda: P.plot_detection({NASTY: [np.nan, np.nan, 1.], 'b': [1., 2., 3.]}, [True, False, True]),
    'threshold nan': lambda: P.plot_threshold_curve([.1, .2], {'a': [[1., np.nan], [2., np.nan]]}, chosen=.1, log=True),
    'message long': lambda: P.plot_message('word ' * 80)}

@pytest.mark.parametrize('name', CASES)
def test_edge_cases_draw_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        figure = CASES[name]()
        light, dark = P.figure_png(figure), P.figure_png(figure, 'dark')
    assert figure.alt and light != dark
    assert Image.open(io.BytesIO(light)).size == Image.open(io.BytesIO(dark)).size and max(Image.open(io.BytesIO(light)).size) < 2500

def test_figures_touch_no_global_state():
    import matplotlib.pyplot as plt
    with mpl.rc_context({'text.color': 'red', 'figure.facecolor': 'black', 'savefig.facecolor': 'green', 'lines.linewidth': 9}):
        before = dict(mpl.rcParams); png = P.figure_png(figure := CASES['similarity labels']())
        assert dict(mpl.rcParams) == before
    assert P.figure_png(CASES['similarity labels']()) == png == P.figure_png(figure) and plt.get_fignums() == []
    P.figure_png(figure, 'dark'); assert P.figure_png(figure) == png

def test_any_figure_can_be_drawn_dark():
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(); ax.plot([1, 2], color='black'); ax.bar([1, 2], [1, 2]); ax.legend(['a']); plt.close(figure)
    pixel = Image.open(io.BytesIO(P.figure_png(figure, 'dark'))).convert('RGB').getpixel((0, 0))
    assert mpl.colors.to_hex(np.array(pixel)/255) == P.DARK[P.PAPER]

def test_shapes_are_named_in_errors():
    with pytest.raises(ValueError, match=r'similarity must have 2 dimensions, got shape \(3,\)'): P.plot_similarity([1., 2., 3.])
    with pytest.raises(ValueError, match=r'false_negatives has shape \(2, 2\), the values have \(6, 6\)'): P.plot_weight_histogram(B, false_negatives=np.eye(2))
    with pytest.raises(ValueError, match='images holds 2 pictures for 6 rows'): P.plot_weights(B, images=[None]*2)

@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.integers(4, 60), st.integers(1, 5))
def test_any_text_becomes_drawable(text, width, lines):
    clean = P.clean_text(text)
    clean.encode('utf-8'); assert '\n' not in clean and P.clean_text(clean) == clean
    wrapped = P.wrap_text(text, width, lines).split('\n')
    assert len(wrapped) <= lines and max(map(len, wrapped)) <= max(width, 4)

@settings(max_examples=40, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3), max_leaves=8))
def test_plain_is_always_strict_json(value): json.dumps(plain(value), allow_nan=False).encode('utf-8')

@pytest.mark.browser
def test_pages_in_a_browser(tmp_path):
    if missing := browser_missing(): pytest.skip(missing)
    from playwright import sync_api as sync
    make_report(tmp_path); make_audit(tmp_path); found = []
    def look(): # playwright's sync interface wants a thread without an event loop
        with sync.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=find_chromium(), args=FLAGS)
            for name in ('report', 'audit'):
                for scheme, width in (('light', 1200), ('dark', 400)):
                    page = browser.new_page(viewport=dict(width=width, height=800), color_scheme=scheme); noise = []
                    page.on('console', lambda m: noise.append(m.text)); page.on('dialog', lambda d: (noise.append(d.message), d.dismiss()))
                    page.on('request', lambda r: None if r.url.startswith(('file:', 'data:')) else noise.append(r.url))
                    page.goto((tmp_path/f'{name}.html').as_uri()); page.keyboard.press('Tab')
                    found.append((noise, page.evaluate('document.documentElement.scrollWidth') - width, page.evaluate('document.activeElement.className'),
                        page.evaluate('getComputedStyle(document.body).backgroundColor'), '<script>alert("x")</script>' in page.inner_text('body'),
                        page.evaluate('[...document.images].filter(i => !i.complete || !i.naturalWidth).length')))
            browser.close()
    thread = threading.Thread(target=look); thread.start(); thread.join(60)
    assert len(found) == 4
    for (noise, overflow, first, background, shown, broken), dark in zip(found, (False, True)*2):
        assert not noise and overflow <= 0 and first == 'skip' and shown and not broken and background == ('rgb(15, 17, 20)' if dark else 'rgb(246, 246, 244)')
