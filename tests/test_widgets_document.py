"The page of a summary and the document view: numbers against the arrays, bad cases, and both in real browsers."
import json, math, re
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import traitlets as T
from hypothesis import given, settings, strategies as st
from PIL import Image
from vlwb.bench import browser
from vlwb.data.documents import DocumentResult, make_documents
from vlwb.viz.documents import PICKS, best_sentences, check_result, pick_kinds, plot_alignment, plot_summary_attention, toy_results, verdicts, what_is_missing, write_summary_page
from vlwb.viz.plots import figure_png
from vlwb.widgets.document import LAYERS, METHODS, DocumentState, DocumentView, line, word

NASTY = '<script>alert("x")</script> & \'quotes\' "><img src=x onerror=alert(1)> $5 {{ 7*7 }}'
RTL, LONG, NAN = 'שלושה ריבועים כחולים ליד עיגול', 'a very long sentence ' * 300, float('nan')


@pytest.fixture(scope='module')
def results(): return toy_results(make_documents(4, seed=3))


def odd(**more):
    "No second pass, no truth, no pictures, sentences of every kind."
    return dict(sentences=[NASTY, RTL, LONG, 'a\nb\x00c\u202e', ''], images=[None, Path('no <b>folder')/'gone.jpg'], coarse=[[.1, .2, NAN, .4, .5], [NAN]*5], caption=[3, -1], plain=[4, 0], chosen=1) | more


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_best_sentences_are_those_of_a_plain_sort(data):
    S = data.draw(st.integers(0, 8)); score = st.one_of(st.just(NAN), st.integers(-3, 3).map(float))
    coarse, fine = (np.array(data.draw(st.lists(score, min_size=S, max_size=S))) for _ in range(2))
    expected = sorted((j for j in range(S) if fine[j] == fine[j]), key=lambda j: -fine[j]) + sorted((j for j in range(S) if fine[j] != fine[j] and coarse[j] == coarse[j]), key=lambda j: -coarse[j])
    assert best_sentences(coarse, fine, None).tolist() == expected and best_sentences(coarse, fine, 2).tolist() == expected[:2]
    assert best_sentences(coarse, None, None).tolist() == sorted((j for j in range(S) if coarse[j] == coarse[j]), key=lambda j: -coarse[j])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_marks_and_verdicts_agree(data):
    K, S = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)); at = st.lists(st.integers(-1, S - 1), min_size=K, max_size=K).map(np.array)
    picked, truth = data.draw(at), data.draw(at); kinds, words = pick_kinds(picked, truth, S), verdicts(picked, truth)
    assert sum(m.astype(int) for m in kinds.values()).max() <= 1 and set(kinds) <= set(PICKS)
    for k in range(K):
        assert words[k] == ('' if picked[k] < 0 > truth[k] else 'picked' if truth[k] < 0 else 'missed' if picked[k] < 0 else 'right' if picked[k] == truth[k] else 'wrong')
        for kind, mask in kinds.items():
            where = np.flatnonzero(mask[k]).tolist()
            assert where == ([int(truth[k])] if kind == 'missed' and words[k] in ('wrong', 'missed') else [int(picked[k])] if kind == words[k] and kind != 'missed' else [])


def test_results_are_checked(results):
    r = check_result(results[0]); assert isinstance(r, DocumentResult) and r.truth.dtype == np.int64
    unknown = check_result(dict(coarse=np.zeros((2, 3)), truth=[-1, -1], reference=[False, False], gold=[])); assert unknown.truth is None and unknown.reference is None and unknown.gold is None and unknown.chosen == -1
    assert np.isnan(check_result(dict(coarse=[[math.inf, 1.]])).coarse[0, 0])
    for wrong in (dict(coarse=np.zeros((2, 3)), sentences=['a']), dict(coarse=np.zeros((2, 3)), plain=[0, 3]), dict(coarse=np.zeros((2, 3)), reference=[True]), dict(coarse=np.zeros((1, 1)), page=1)):
        with pytest.raises(ValueError): check_result(wrong)


@pytest.mark.parametrize('result', [odd(), dict(images=[], sentences=['a']), dict(images=[None], sentences=[]), dict(), dict(coarse=[[.5]], fine=[[.5]], caption=[0], truth=[0], chosen=0, reference=[True]),
                                    dict(coarse=np.zeros((3, 200)), caption=[0, 1, 199]), dict(coarse=np.zeros((60, 3)), caption=[-1]*60), odd(truth=[3, 1]), odd(coarse=np.full((2, 5), NAN))], ids=range(9))
def test_every_result_is_drawn_and_written(result, tmp_path):
    figure = plot_alignment(result, title=NASTY); assert figure.alt and figure_png(figure, 'dark')
    page = write_summary_page(tmp_path/'page.html', result, title=NASTY).read_text('utf-8')
    assert '<script' not in page and all(n in page for n in ('id="summary"', 'id="document"')) and len(what_is_missing(result)) == page.split('id="notes"')[1].count('<li>')
    ids, links = re.findall(r' id="([^"]+)"', page), re.findall(r'href="#([^"]+)"', page)
    assert len(set(ids)) == len(ids) and set(links) <= set(ids) and not re.search(r'\bnan\b', re.sub(r'data:image/[^"]*', '', page), re.I)
    view = DocumentView(result)
    for view.state.layer in LAYERS: assert view.canvas.values == view.state.layer
    for view.state.method in METHODS: assert view.figure().alt
    assert isinstance(view.selected, pd.DataFrame) and ('role="status"' in view.says.value) == bool(what_is_missing(result))


def test_the_page_says_what_is_in_the_result(results, tmp_path):
    r = results[0]; page = write_summary_page(tmp_path/'a'/'page.html', r, credits=[f'<i>credit {k}</i>' for k in range(len(r.images))], summary='by a <b>toy</b>').read_text('utf-8')
    assert r.title in page and '&lt;i&gt;credit 1&lt;/i&gt;' in page and 'by a &lt;b&gt;toy' in page and "default-src 'none'" in page
    cards = page.split('<article')[1:]; assert len(cards) == len(r.images)
    for k, text in enumerate(cards):
        text = text.split('</article>')[0]; others = [j for j in best_sentences(r.coarse[k], r.fine[k], None) if j != r.caption[k]][:3]
        assert [int(n) - 1 for n in re.findall(r'<th scope="row"><a href="#sentence-(\d+)"', text)] == others and f'sentence {r.caption[k] + 1}</a>' in text
        assert re.findall(r'<td class="number">([^<]*)</td>', text) == [f'{x:.3f}' if np.isfinite(x) else '–' for j in others for x in (r.fine[k, j], r.coarse[k, j])]
        assert ('the true one</span></h3>' in text) == (r.caption[k] == r.truth[k]) and ('>chosen<' in text) == (k == r.chosen)
    assert page.count('pseudo caption of image') == len(r.images) and 'data:image/jpeg' in page
    bare = write_summary_page(tmp_path/'b.html', r, figures=False).read_text('utf-8'); assert 'figure-1' not in bare and len(bare) < len(page)
    hard = write_summary_page(tmp_path/'c.html', odd(), credits=[NASTY, RTL]).read_text('utf-8'); assert 'gone.jpg' in hard and 'folder' not in hard and 'no picture at hand' in hard


def test_state_starts_steps_and_says_numbers(results):
    s = DocumentState(results); r = s.result
    assert s.image == r.chosen and s.sentence == r.caption[s.image] and s.names == [x.title for x in results]
    for k in range(len(r.images)):
        s.look(k); assert s.sentence == r.caption[k]
        table = s.selected(); row = table[table.pseudo_caption].iloc[0]
        assert row.sentence == r.caption[k] and (row.fine == r.fine[k, row.sentence] or math.isnan(row.fine)) and row.coarse == r.coarse[k, row.sentence] and table.true.sum() == 1 and sorted(table.sentence) == list(range(len(r.sentences)))
        np.testing.assert_array_equal(s.words().attention, r.attention[:,k])
    s.method = 'plain'; assert s.sentence == r.plain[s.image]; s.look(1, 0); assert (s.image, s.sentence) == (1, 0); s.look(1); assert s.sentence == r.plain[1]
    images = s.images(); assert (images.verdict == 'right').sum() == (r.plain == r.truth).sum() and images.chosen.sum() == 1 and images.similarity.tolist() == r.image_scores.tolist()
    s.step(-1); assert s.document == 0; s.step(9); assert s.document == len(results) - 1
    for name, value in (('document', 99), ('image', 99), ('image', -1), ('sentence', 999), ('layer', 'x'), ('method', 'x'), ('least', 1.5)):
        with pytest.raises(T.TraitError): setattr(s, name, value)
    shrinking = DocumentState([dict(coarse=np.zeros((9, 30)), caption=[29]*9), dict(coarse=np.zeros((1, 2)), caption=[1]), dict(images=[], sentences=[])]); shrinking.look(8); shrinking.step(1); assert (shrinking.image, shrinking.sentence) == (0, 1); shrinking.step(1); assert (shrinking.image, shrinking.sentence) == (-1, -1); shrinking.document = 0; assert shrinking.sentence == 29


def test_controls_and_state(results):
    view = DocumentView(results); s, r = view.state, view.state.result
    assert len(view.cards.cards) == len(r.images) and view.cards.chosen == s.image and view.canvas.cell == [s.image, s.sentence] and view.text.chosen == s.sentence
    for k in range(len(r.images)):
        view.cards.chosen = k; assert s.image == k and view.canvas.cell == [k, r.caption[k]] and view.text.lines[r.caption[k]]['used'] and f'image {k + 1}, 0<' in view.key.value
        assert [p['value'] for p in view.words.lines[0]['parts']] == [f'{a:.2f}' for a in r.attention[:,k]]
    view.canvas.cell = [0, 1]; assert (s.image, s.sentence) == (0, 1) and view.cards.chosen == 0 and view.text.chosen == 1
    view.canvas.cell = [2, 1]; assert (s.image, s.sentence) == (2, 1) and view.canvas.cell == [2, 1]
    view.text.chosen = 4; assert s.sentence == 4 and view.canvas.cell == [2, 4]
    view.layer.value = 'coarse'; assert s.layer == 'coarse' == view.canvas.values; s.layer = 'fine'; assert view.layer.value == 'fine'
    view.method.value = 'plain'; marks = {m['name']: (m['count'], m['label']) for m in view.canvas.marks}; assert marks['own'] == (int((r.plain == r.truth).sum()), PICKS['right'][0]) and view.cards.cards[3]['texts'][0]['text'] == r.sentences[r.plain[3]]
    view.least.value = .8; assert sum(p['strong'] for p in view.words.lines[0]['parts']) == (r.attention[:,s.image] >= .8).sum() == s.words().marked.sum()
    view.numbers.value = True; assert view.words.values and s.numbers
    view.forth.click(); assert s.document == 1 == view.document.value and view.canvas.shape == list(results[1].coarse.shape) and view.cards.chosen == s.image == results[1].chosen and view.canvas.values == 'fine' and view.method.value == 'plain'
    view.document.value = 3; assert s.document == 3 and view.forth.disabled and not view.back.disabled and len(view.text.lines) == len(results[3].sentences)
    view.back.click(); assert s.document == 2
    codes = view.canvas._data['fine'][0]; assert (codes.numpy() == 255).sum() == np.isnan(results[2].fine).sum()


def test_pictures_have_numbers_of_their_own(results):
    view = DocumentView(results, credits=[[f'by {d}.{k}' for k in range(len(r.images))] for d, r in enumerate(results)]); seen = []
    for d in range(len(results)):
        view.state.document = d; seen += [c['picture'] for c in view.cards.cards]; assert all(f'by {d}.{k}' in c['note'] for k, c in enumerate(view.cards.cards))
    assert len(set(seen)) == len(seen) == sum(len(r.images) for r in results), 'the browser keeps pictures by number'
    assert all(view.thumbnails(i)[:2] == b'\xff\xd8' for i in seen)


def test_texts_stay_texts_and_what_is_missing_is_said(tmp_path):
    Image.new('RGB', (8, 8), 'red').save(tmp_path/'a.png'); (tmp_path/'broken.png').write_bytes(b'no picture')
    view = DocumentView(odd(images=[tmp_path/'a.png', tmp_path/'broken.png'], summary=[NASTY]), names=[NASTY])
    assert 'broken.png' in view.cards.cards[1]['note'] and str(tmp_path) not in json.dumps(view.cards.cards) and view.thumbnails(0) and not view.thumbnails(1)
    assert view.text.lines[0]['parts'][0]['text'] == NASTY and view.text.lines[4]['parts'][0]['text'] == '(an empty sentence)' and not set('\0\n') & set(view.text.lines[3]['parts'][0]['text'])
    assert '<script' not in view.facts.value + view.says.value + view.key.value + view.place.value and '&lt;script' in view.facts.value and 'no sentence was picked' in view.cards.cards[1]['texts'][0]['text']
    assert NASTY in view.words.lines[0]['parts'][0]['text'] and 'No attention' in view.key.value and view.shades.layout.display == 'none' and 'image 2' in view.outcome.value and view.gold_part.layout.display == 'none'
    for name in ('no second pass', 'not known', 'no gold', 'attention'): assert name in view.says.value.lower()
    for wrong in (lambda: line('a', badges=[('b', 'x')]), lambda: word('a', -1), lambda: DocumentView([]), lambda: DocumentView(odd(), names=[])):
        with pytest.raises(ValueError): wrong()


def test_what_is_not_there_takes_no_room(results):
    view = DocumentView([results[0], dict(images=[], sentences=['a'], summary=[NASTY]), dict(images=[None], sentences=[])]); shown = lambda: [x.layout.display != 'none' for x in (view.of_images, view.of_pairs)]
    assert shown() == [True, True]; view.forth.click(); assert shown() == [False, False]; view.forth.click(); assert shown() == [True, False]; view.state.document = 0; assert shown() == [True, True]
    assert view.canvas.row_ticks == [f'image {k + 1}' for k in range(len(results[0].images))] and view.canvas.column_ticks == [str(j + 1) for j in range(len(results[0].sentences))]


def test_the_first_layer_has_scores(results):
    "Without a second pass anywhere the coarse scores are drawn first, unless somebody asks."
    assert DocumentView(odd()).canvas.values == 'coarse' and DocumentView(odd(), layer='fine').canvas.values == 'fine' and DocumentView([odd(), results[0]]).canvas.values == 'fine' and DocumentView(dict()).state.layer == 'coarse'


def test_numbers_and_long_texts():
    view = DocumentView(dict(sentences=[LONG, 'b'], images=[None], coarse=[[-.001, .2]], caption=[0], chosen=0))
    assert 'coarse 0.00' in view.text.lines[0]['note'] and '-0.00' not in view.facts.value and len(view.cards.cards[0]['texts'][0]['text']) <= 110 and view.text.lines[0]['parts'][0]['text'].startswith(LONG[:1000])
    assert 'max-height' not in view.facts.value and view.cards.cards[0]['note'] == '', 'nothing is known of the likeness, and the card says itself that there is no picture'


def test_without_a_browser_there_is_a_picture(results, monkeypatch):
    monkeypatch.setenv('VLWB_STATIC', '1'); view = DocumentView(results)
    bundle = view._repr_mimebundle_(); assert set(bundle) == {'image/png', 'text/plain'} and bundle['image/png'][:4] == b'\x89PNG' and f'Alignment of {len(results[0].images)} images' in bundle['text/plain']
    r, s = results[0], view.state; first = r.tokens[int(np.argmax(r.attention[:,s.image]))]; figure = view.figure()
    said = ' '.join(t.get_text() for t in figure.axes[0].texts).replace('\n', ' '); assert f'Most attention to the pseudo caption of image {s.image + 1}: “{first}” {r.attention[:,s.image].max():.2f}' in said
    nothing = DocumentView(dict(images=[], sentences=['a'], summary=[NASTY])).figure(); assert 'no images' in nothing.alt and NASTY in nothing.alt
    assert plot_summary_attention(results[0].tokens, results[0].attention).alt


def test_the_page_in_a_browser(chromium, results, tmp_path, shots):
    "Nothing runs, nothing is loaded, light and dark, wide and narrow."
    write_summary_page(tmp_path/'page.html', results[0]); write_summary_page(tmp_path/'odd.html', odd(summary=[NASTY, RTL]), title=NASTY)
    for name in ('page', 'odd'):
        for scheme in ('light', 'dark'):
            context, said = chromium.browser.new_context(viewport=dict(width=1100, height=900), color_scheme=scheme, offline=True), []; page = context.new_page()
            page.on('dialog', lambda d: (said.append(d.message), d.dismiss())); page.on('console', lambda m: said.append(m.text)); page.on('request', lambda r: r.url.startswith(('file:', 'data:')) or said.append(r.url))
            page.goto((tmp_path/f'{name}.html').as_uri()); page.get_by_role('heading', name='Summary', exact=True).wait_for()
            assert page.locator('img').evaluate_all('x => x.every(i => !i.offsetParent || (i.complete && i.naturalWidth > 0))') and not said
            (shots).mkdir(parents=True, exist_ok=True); page.screenshot(path=str(shots/f'summary-{name}-{scheme}.png'), full_page=True)
            page.set_viewport_size(dict(width=390, height=800)); assert page.evaluate('document.documentElement.scrollWidth') <= 390
            context.close()


CELLS = r'''
from pathlib import Path
from vlwb.data.documents import make_documents
from vlwb.viz.documents import toy_results
from vlwb.widgets.document import DocumentView
results = toy_results(make_documents(3, seed=3))
odd = dict(sentences=['<script>alert(1)</script><b>bold?</b>', 'كلب أسود يجري على الشاطئ', 'word '*300], images=[None, Path('gone.jpg')], coarse=[[.1, .2, .3], [.3, .2, .1]], caption=[0, -1], plain=[2, 0], summary=['<script>alert(2)</script>'], chosen=0)
view = DocumentView([*results, odd], names=['one', 'two', 'three', '<i>odd</i>'])
view
'''


@pytest.mark.parametrize('where', ['lab', 'voila'])
def test_in_the_browser(where, request, tmp_path):
    "By mouse and by keyboard: image, cell, line, layer, method, document; kernel's state and picture both change."
    open_page = request.getfixturevalue(where)
    cells = [CELLS, browser.watch('view.state', ['document', 'image', 'sentence', 'layer', 'method', 'least', 'numbers'], tmp_path/'state.json')]
    page = open_page(cells, size=(1300, 1900)); p = page.page; state = lambda f: browser.wait_state(tmp_path/'state.json', f)
    results = toy_results(make_documents(3, seed=3)); r, canvas = results[0], '.vlwb-document .vlwb-matrix canvas'
    drawn = lambda image, sentence: p.wait_for_function('''([i, j]) => { const e = document.querySelector('.vlwb-document .vlwb-cards [aria-selected=true]'), t = document.querySelector('.vlwb-marked.choosable');
        return e && +e.dataset.n === i && +t.dataset.chosen === j && document.querySelector('.vlwb-facts').textContent.includes(`image ${i + 1},`); }''', arg=[int(image), int(sentence)])
    chosen = lambda image, sentence: (state(lambda s: (s['image'], s['sentence']) == (image, sentence)), drawn(image, sentence))
    p.locator('.vlwb-document img.vlwb-photo').nth(len(r.images) - 1).wait_for(); p.locator(f'{canvas}[data-whole="1"][data-layer="fine"]').wait_for(); chosen(r.chosen, r.caption[r.chosen])
    key = p.locator('.vlwb-words-key'); before, words = page.pixels(canvas), key.inner_text()
    p.locator('.vlwb-document .vlwb-card').nth(1).click(); chosen(1, r.caption[1]); before = page.wait_pixels(canvas, before)
    p.wait_for_function('t => document.querySelector(".vlwb-words-key").innerText !== t', arg=words); assert 'image 2' in key.inner_text()
    p.locator('.vlwb-document .vlwb-card').nth(1).focus(); p.keyboard.press('ArrowRight'); p.keyboard.press('Enter'); chosen(2, r.caption[2]); before = page.wait_pixels(canvas, before)

    K, S = r.coarse.shape; box = p.locator(canvas).bounding_box()           # a click at image 1, sentence 4
    p.mouse.click(box['x'] + box['width']*3.5/S, box['y'] + box['height']*.5/K); chosen(0, 3); before = page.wait_pixels(canvas, before)
    p.locator(canvas).focus(); p.keyboard.press('ArrowDown'); p.keyboard.press('ArrowRight'); p.keyboard.press('Enter'); chosen(1, 4); before = page.wait_pixels(canvas, before)
    line = p.locator('.vlwb-marked.choosable .vlwb-line'); line.nth(2).click(); chosen(1, 2); before = page.wait_pixels(canvas, before)
    p.keyboard.press('ArrowDown'); p.keyboard.press('Enter'); chosen(1, 3); before = page.wait_pixels(canvas, before)

    p.get_by_role('button', name='coarse: all sentences').click(); state(lambda s: s['layer'] == 'coarse'); p.locator(f'{canvas}[data-layer="coarse"]').wait_for(); before = page.wait_pixels(canvas, before)
    p.get_by_role('button', name='plain retrieval').click(); state(lambda s: s['method'] == 'plain'); chosen(1, r.plain[1]); p.get_by_text('plain pick of image 2').wait_for()
    p.get_by_role('button', name='pseudo captions (matching)').click(); state(lambda s: s['method'] == 'matching'); chosen(1, r.caption[1])
    strong = p.locator('.vlwb-word.strong').count(); page.slide('.vlwb-document .widget-hslider', 9, 'ArrowLeft'); state(lambda s: s['least'] < .06); p.wait_for_function('n => document.querySelectorAll(".vlwb-word.strong").length > n', arg=strong)
    p.get_by_label('numbers beside the words').check(); state(lambda s: s['numbers']); p.locator('.vlwb-marked.values .value').first.wait_for()
    p.wait_for_timeout(500); page.shot(open_page.shots/f'document-{where}.png')

    before = page.pixels(canvas); p.get_by_role('button', name='next').click(); state(lambda s: s['document'] == 1); chosen(results[1].chosen, results[1].caption[results[1].chosen])
    p.get_by_text('document 2 of 4').wait_for(); page.wait_pixels(canvas, before); line.nth(len(results[1].sentences) - 1).wait_for(); assert line.count() == len(results[1].sentences) and line.first.locator('.said').inner_text() == results[1].sentences[0]
    p.get_by_role('button', name='next').focus(); p.keyboard.press('Enter'); state(lambda s: s['document'] == 2); p.get_by_text('document 3 of 4').wait_for(); chosen(results[2].chosen, results[2].caption[results[2].chosen])
    p.locator('.vlwb-document select').select_option('4: <i>odd</i>'); state(lambda s: s['document'] == 3); p.get_by_text('document 4 of 4').wait_for(); chosen(0, 0)
    line.first.get_by_text('<script>alert(1)</script><b>bold?</b>').wait_for(); p.locator('.vlwb-marked').get_by_text('<script>alert(2)</script>').wait_for(); p.locator('.vlwb-document .vlwb-photo.none', has_text='no picture at hand').nth(1).wait_for()
    assert p.locator('.vlwb-document .vlwb-marked b').count() == 0 and 'no second pass' in p.locator('.vlwb-says').inner_text()
    page.shot(open_page.shots/f'document-odd-{where}.png')
    if where == 'lab': assert p.evaluate('window.jupyterapp.shell.currentWidget.content.widgets.length') == 2, 'no key reached JupyterLab'


WIDE = r'''
import numpy as np
from vlwb.widgets.document import DocumentView
rng = np.random.default_rng(0)
view = DocumentView([dict(sentences=[f'sentence {j + 1}' for j in range(60)], images=[None]*12, coarse=rng.random((12, 60)), fine=rng.random((12, 60)), caption=np.arange(12), chosen=0), dict(images=[], sentences=['alone'])])
view
'''


def test_many_images_and_a_changed_theme(lab):
    "Names beside the matrix follow the zoom, the chosen card comes into sight, and the matrix outlives a change of theme."
    page = lab([WIDE], size=(900, 1500)); p = page.page; canvas = '.vlwb-document .vlwb-matrix canvas'; p.locator(f'{canvas}[data-whole="1"]').wait_for()
    ticks = lambda side: p.locator(f'.vlwb-matrix .ticks.{side} span')
    ticks('left').nth(11).wait_for(); assert ticks('left').all_inner_texts() == [f'image {k + 1}' for k in range(12)]
    boxes = ticks('top').evaluate_all('x => x.map(e => { const q = e.getBoundingClientRect(); return [+e.textContent, q.left, q.right]; })'); assert 5 < len(boxes) < 60 and all(a[2] < b[1] for a, b in zip(boxes, boxes[1:])), 'no two overlap'
    at = p.locator(canvas).bounding_box(); assert all(abs((l + r)/2 - at['x'] - (n - .5)/60*at['width']) < 3 for n, l, r in boxes)
    p.locator(canvas).focus(); p.keyboard.press('+'); p.keyboard.press('+'); p.wait_for_function('() => [...document.querySelectorAll(".vlwb-matrix .ticks.top span")].every((e, k, x) => !k || e.textContent - x[k - 1].textContent === 1)'); assert 1 < ticks('left').count() < 12
    p.get_by_role('button', name='all: show everything').click(); ticks('left').nth(11).wait_for()

    card = p.locator('.vlwb-document .vlwb-card').nth(11); inside = 'e => { const a = e.getBoundingClientRect(), b = e.parentElement.getBoundingClientRect(); return a.left >= b.left - 1 && a.right <= b.right + 1; }'
    assert not card.evaluate(inside); page.ask('view.state.set_trait("image", 11)'); p.wait_for_function(f'() => ({inside})(document.querySelectorAll(".vlwb-document .vlwb-card")[11])')

    for dark in (True, False, True):
        page.theme(dark); p.wait_for_timeout(1000); width, shown = p.locator(canvas).evaluate('c => [c.width, c.offsetWidth]'); assert width == shown > 300
    page.shot(lab.shots/'document-many-dark.png')
    page.ask('view.state.set_trait("document", 1)'); p.get_by_text('document 2 of 2').wait_for(); p.locator(canvas).wait_for(state='hidden'); assert p.locator('.vlwb-document').get_by_text('This document has no images.').count() == 1


def test_dark_theme_and_speed(lab):
    page = lab([CELLS], dark=True, size=(1300, 1900)); p = page.page; p.locator('.vlwb-document img.vlwb-photo').first.wait_for(); p.locator('.vlwb-matrix canvas[data-whole="1"]').wait_for()
    p.get_by_label('numbers beside the words').check(); p.locator('.vlwb-marked.values .value').first.wait_for(); p.wait_for_timeout(500); page.shot(lab.shots/'document-dark.png')
    found = page.time_change('.vlwb-document .noUi-handle', '.vlwb-words-key', times=5)
    print('bound of marked words moved:', sorted(round(f['frame']) for f in found), 'ms')
