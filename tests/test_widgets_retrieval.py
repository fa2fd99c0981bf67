"The retrieval browser: results against the plain score matrix, bad cases, and the view in JupyterLab and voila."
import math
import numpy as np
import pytest
import torch
import traitlets as T
from PIL import Image
from vlwb.bench import browser
from vlwb.core import make_generator
from vlwb.data.pairs import Pairs
from vlwb.data.relevance import from_pairs
from vlwb.widgets.gallery import Gallery
from vlwb.widgets.retrieval import DIRECTIONS, KIND_WORDS, MOST, ORDERS, Encoder, RetrievalBrowser, RetrievalState, compare_queries, first_found, pair_kinds

unit = lambda n, seed, d=8: torch.nn.functional.normalize(torch.randn(n, d, generator=make_generator(seed)), dim=1)
RTL, LONG = 'كلب أسود يجري على الشاطئ', 'a very long caption ' * 60


def galleries(n=12, each=2, seed=0, known=True, images=None, captions=None):
    m = n*each
    captions = captions or [f'caption number {j} of {j//each}' for j in range(m)]
    pairs = Pairs.from_arrays(images, captions, np.arange(m)//each, image_ids=[f'im{i}' for i in range(n)])
    rng = np.random.default_rng(seed); i, j = rng.integers(n, size=40), rng.integers(m, size=40)
    judged = from_pairs([f'im{a}' for a in i], [str(b) for b in j], rng.random(40) < .5, rows=pairs.image_ids, columns=pairs.caption_ids) if known else None
    return [Gallery(pairs, unit(n, s), unit(m, s + 50), judged, name=name) for s, name in ((1, 'one'), (2, '<b>two</b>'))]


@pytest.mark.parametrize('direction', DIRECTIONS)
def test_results_are_those_of_the_score_matrix(direction):
    a, b = galleries(); state = RetrievalState(a, b, direction=direction, k=7)
    for query in range(state.count):
        state.choose(query)
        for n, g in enumerate((a, b)):
            scores = g.similarity[query] if direction == 'i2t' else g.similarity[:,query]
            values, index = scores.sort(descending=True, stable=True); hits = state.hits(n)
            assert hits.index.tolist() == index[:7].tolist(); np.testing.assert_allclose(hits.similarity, values[:7], atol=1e-6)
            truth, own = (x[query] if direction == 'i2t' else x[:,query] for x in (g.truth, g.own.numpy()))
            assert hits.kinds == ['own' if own[i] else {1: 'match', 0: 'non-match', -1: 'nobody looked'}[int(truth[i])] for i in hits.index]
            right = torch.from_numpy(own | (truth == 1)); first = (~right[index]).cumsum(0)[right[index]][0] if right.any() else None
            assert state.standing(n) == dict(matches=int(right.sum()), rank=1. + int(first))


def test_every_query_compared():
    a, b = galleries(); state = RetrievalState(a, b, k=4)
    for direction in DIRECTIONS:
        state.turn(direction); rows = state.disagreements().set_index('query')
        for query in range(state.count):
            state.choose(query); r = rows.loc[query]
            assert r.rank_first == state.standing(0)['rank'] and r.rank_second == state.standing(1)['rank'] and r.rank_gain == r.rank_first - r.rank_second
            assert r.overlap == len(set(state.hits(0).index) & set(state.hits(1).index))/4
        for name in ORDERS:
            for down in (True, False):
                state.order_by, state.descending = name, down; column = state.disagreements()[name].dropna()
                assert (column.is_monotonic_decreasing if down else column.is_monotonic_increasing)
    assert list(state.figures().model) == ['one', '<b>two</b>'] and (state.figures().queries == 24).all()


def test_only_own_captions_count_on_demand():
    a, b = galleries(); state = RetrievalState(a, b, direction='i2t', judged_by='own')
    assert (state.disagreements().matches == 2).all()
    state.judged_by = 'all'; assert (state.disagreements().matches > 2).any()
    blind = RetrievalState(*galleries(known=False)); assert blind.judged_by == 'own' and set(blind.table().known) <= {'own', 'not known'}
    with pytest.raises(T.TraitError, match='needs a gallery with relevance'): blind.judged_by = 'all'


def test_what_does_not_fit():
    a, b = galleries(); other = galleries(n=11)[0]
    with pytest.raises(ValueError, match='same image_ids.*12 and 11'): RetrievalState(a, other)
    moved = Gallery(Pairs.from_arrays(None, a.pairs.captions, a.pairs.caption_image[::-1], image_ids=a.pairs.image_ids), b.image_features, b.text_features)
    with pytest.raises(ValueError, match='whose captions'): RetrievalState(a, moved)
    for wrong in (dict(query=24), dict(query=-1), dict(k=0), dict(k=MOST+1), dict(direction='up'), dict(order_by='x')):
        with pytest.raises(T.TraitError): RetrievalState(a, b, **wrong)
    with pytest.raises(ValueError, match='as much'): compare_queries((None, np.zeros((2, 3))), (None, np.zeros((2, 4))))
    same = RetrievalState(a, a); assert same.names == ('one (A)', 'one (B)') and (same.disagreements().overlap == 1).all()


def test_empty_one_and_no_match():
    a, b = galleries()
    none = RetrievalBrowser(a.select([]), b.select([])); assert none.state.count == 0 and none.asked.cards == [] and 'no captions' in none.asked.empty and 'No query has' in none.rows.empty or none.rows.rows == []
    none.direction.value = 'i2t'; assert 'no images' in none.asked.empty and none.figure().alt.startswith('No retrieval')
    one = RetrievalBrowser(a.select([0], True), b.select([0], True)); assert one.state.standing(1)['rank'] == 1 and len(one.lists[0].cards) == 1 and one.figure().alt
    bare = Pairs.from_arrays(None, ['x'], [0], image_ids=['a', 'b'])                    # an image without a caption
    lonely = RetrievalBrowser(*(Gallery(bare, unit(2, s), unit(1, s)) for s in (1, 2)), direction='i2t', query=1)
    assert math.isnan(lonely.state.standing(0)['rank']) and 'no match of this query is known' in lonely.heads[0].value and math.isnan(lonely.state.disagreements().rank_first.iloc[1]) and lonely.rows.rows[1][2] == '–'
    lonely.direction.value = 't2i'; assert lonely.state.query == 0


def test_texts_stay_texts():
    captions = ['<script>alert(1)</script>', RTL, LONG, '', 'a\nb\u202e\0c'] + ['x']*19
    view = RetrievalBrowser(*galleries(captions=captions), direction='i2t', k=24)
    shown = [t['text'] for c in view.lists[0].cards for t in c['texts']]
    assert '<script>alert(1)</script>' in shown and RTL in shown and '(no text)' in shown and max(map(len, shown)) <= 600 and not any('\0' in t or '\n' in t for t in shown)
    assert '&lt;b&gt;two' in view.heads[1].value and '<b>two' not in view.heads[1].value and '&lt;b&gt;two' in view.figures.value
    assert view.figure().alt and view.asked.cards[0]['texts'][0]['tone'] == 'own'
    assert all(set(KIND_WORDS) >= set(view.state.hits(n).kinds) for n in (0, 1))


def test_missing_pictures(tmp_path):
    Image.new('RGB', (8, 8), 'red').save(tmp_path/'a.png'); (tmp_path/'broken.png').write_bytes(b'no picture')
    view = RetrievalBrowser(*galleries(n=3, images=[tmp_path/'a.png', tmp_path/'missing.png', tmp_path/'broken.png']), k=3)
    assert [bool(view.lists[0].thumbnails(i)) for i in range(3)] == [True, False, False] and view.figure().alt


def test_controls_and_state():
    view = RetrievalBrowser(*galleries(n=40)); s = view.state
    view.k.value = 9; assert s.k == 9 and len(view.lists[0].cards) == 9
    s.k = 2; assert view.k.value == 2 and len(view.lists[1].cards) == 2
    view.query.value = 33; assert s.query == 33 and view.asked.cards[0]['picture'] == 16
    view.forth.click(); assert view.place.value == '25 to 48 of 80' and view.chooser.chosen == 33 - 24; view.back.click(); assert view.back.disabled and view.chooser.chosen == -1
    view.chooser.chosen = 3; assert s.query == 3 and view.query.value == 3 and view.ask.layout.display is None and view.back.layout.display is None
    view.search.value = 'number 7'; assert s.found().tolist() == [j for j in range(80) if '7' in f'{j} of {j//2}'] and view.place.value.endswith(f'of {len(s.found())}')
    view.search.value = 'nothing like it'; assert view.chooser.cards == [] and view.place.value == 'none'
    view.search.value = ''; view.direction.value = 'i2t'; assert s.direction == 'i2t' and s.query == 1 and view.query.max == 39 and view.lists[0].arrangement == 'list'
    s.search = 'im7'; assert s.found().tolist() == [7] and view.search.value == 'im7'
    view.rows.sort = 'overlap'; assert s.order_by == 'overlap' == view.order_by.value
    view.rows.descending = False; assert s.descending is False and view.descending.value is False
    view.rows_forth.click(); assert view.rows_place.value == '25 to 40 of 40'
    view.rows.chosen = 2; view.rows.clicks += 1; assert s.query == s.disagreements()['query'].iloc[26] and view.rows.chosen == 2
    view.judged_by.value = 'own'; assert s.judged_by == 'own' and view.rows.rows[0][1] == '2'


def test_words_are_found_in_captions_and_ids_in_any_case():
    pairs = Pairs.from_arrays(None, ['A Black DOG', 'Straße am Meer', '', 'dog'], [0, 0, 1, 2], image_ids=['Park_One', 'COCO_0042', 'c'], caption_ids=['X1', 'x2', 'Note 7b', 'y'])
    a, b = (Gallery(pairs, unit(3, k), unit(4, k + 9)) for k in (1, 2)); s = RetrievalState(a, b)
    for direction, cases in (('t2i', {'dog black': [0], 'DOG': [0, 3], 'STRASSE': [1], 'x': [0, 1], '7B note': [2], 'coco': [], '  ': [0, 1, 2, 3]}), ('i2t', {'park': [0], 'one PARK': [0], 'coco 42': [1], 'dog': [0, 2], 'dog meer': [], 'note': []})):
        s.turn(direction)
        for s.search, found in cases.items(): assert s.found().tolist() == found, s.search


def test_a_large_set_is_compared_when_asked():
    a, b = galleries(); view = RetrievalBrowser(a, b, compared=False)
    assert view.rows.rows == [] and view.all.layout.display == 'none' and len(view.lists[0].cards) == 5
    view.compare.click(); assert view.state.compared and len(view.rows.rows) == 24 and view.compare.layout.display == 'none'


def test_queries_of_ones_own():
    a, b = galleries(); seen = []
    encoder = Encoder(lambda texts: seen.append(texts) or torch.eye(8)[:1]*5, lambda image: torch.eye(8)[1:2])
    view = RetrievalBrowser(a, b, (encoder, encoder), direction='i2t'); s = view.state
    view.text.value = ' '; view.ask.click(); assert s.source == 'index' and 'Type a text' in view.says.value
    view.text.value = 'something <i>new</i>'; view.ask.click()
    assert s.source == 'text' and s.direction == 't2i' == view.direction.value and len(seen) == 2 and view.asked.cards[0]['texts'][0]['text'] == 'something <i>new</i>'
    assert s.hits(0).index.tolist() == a.image_features[:,0].sort(descending=True, stable=True).indices[:5].tolist() and set(s.hits(0).kinds) == {'nobody looked'} and 'nobody looked' in view.says.value
    view.chooser.chosen = 4; assert s.source == 'index' and s.query == 4
    s.show_picture(Image.new('RGB', (30, 20), 'blue')); assert s.source == 'picture' and s.direction == 'i2t' and view.asked.thumbnails(99) and s.hits(1).index.tolist() == b.text_features[:,1].sort(descending=True, stable=True).indices[:5].tolist()
    first = view.asked.cards[0]['picture']; s.show_picture(Image.new('RGB', (30, 20), 'red')); assert view.asked.cards[0]['picture'] != first, 'the browser keeps pictures by number'
    s.show_picture(b'\xff\xd8 cut', '<i>cut.jpg'); assert '&lt;i&gt;cut.jpg' in view.says.value
    wide = RetrievalState(a, b, (Encoder(lambda t: torch.ones(1, 9)), encoder)); wide.ask('x'); assert '(1, 9)' in wide.problem and wide.source == 'index'
    assert not RetrievalState(a, b, (encoder, None)).can_text
    with pytest.raises(ValueError, match='encoders'): RetrievalState(a, b).show_picture(Image.new('RGB', (2, 2)))


def test_ties_and_half_precision():
    a, _ = galleries(n=6, each=1); flat = Gallery(a.pairs, torch.ones(6, 4)/2, torch.ones(6, 4)/2, a.relevance)
    assert RetrievalState(flat, flat).hits(0).index.tolist() == [0, 1, 2, 3, 4] and first_found(flat, 'i2t', 3).tolist() == [[0, 1, 2]]*6
    state = RetrievalState(flat, flat, judged_by='own'); assert state.standing(0) == dict(matches=1, rank=3.5)
    half = Gallery(a.pairs, a.image_features.half(), a.text_features.half(), a.relevance); state = RetrievalState(half, a); assert len(state.disagreements()) == 6 and state.standing(0)['matches'] >= 1
    assert pair_kinds(a, np.arange(6), np.arange(6)) == ['own']*6


CELLS = r'''
import numpy as np, torch
from vlwb.data.scenes import make_captions
from vlwb.data.world import COLOURS, SHAPES, make_scenes
from vlwb.widgets.gallery import scenes_gallery
from vlwb.widgets.retrieval import Encoder, RetrievalBrowser
scenes = make_scenes(60, seed=3); captions = make_captions(scenes, per_scene=2, seed=3, false_negative_share=.1)
captions.text[5] = '<script>alert(1)</script>'; captions.text[9] = 'كلب أسود يجري على الشاطئ'
unit = lambda x: torch.nn.functional.normalize(torch.as_tensor(np.asarray(x, dtype=np.float32)) + .01, dim=1)
count = lambda names: lambda texts: unit([[t.count(n) for n in names] for t in texts])
codes = lambda x, names: unit([[(row == k).sum() for k in range(len(names))] for row in x])
one, two = (scenes_gallery(scenes, captions, codes(x, names), count(names)(captions.text), name=name) for x, names, name in ((scenes.colour, COLOURS, 'sees <i>colours</i>'), (scenes.shape, SHAPES, 'sees shapes')))
look = Encoder(count(COLOURS), lambda image: unit(np.asarray(image.resize((1, 1)), dtype=np.float32).reshape(1, 3) @ np.eye(3, len(COLOURS))/255))
view = RetrievalBrowser(one, two, (look, Encoder(count(SHAPES), lambda image: unit(np.ones((1, len(SHAPES)))))))
view
'''


@pytest.mark.parametrize('where', ['lab', 'voila'])
def test_in_the_browser(where, request, tmp_path):
    "Choose by mouse and by keyboard, sort, ask, upload: state and picture both change."
    open_page = request.getfixturevalue(where)
    cells = [CELLS, browser.watch('view.state', ['query', 'direction', 'k', 'source', 'order_by', 'descending', 'text'], tmp_path/'state.json')]
    page = open_page(cells, size=(1300, 1900)); p = page.page; state = lambda f: browser.wait_state(tmp_path/'state.json', f)
    p.locator('.vlwb-retrieval img.vlwb-photo').first.wait_for(); p.get_by_text('<script>alert(1)</script>').first.wait_for()
    results = p.locator('.vlwb-cards[aria-label="what sees shapes finds"]'); assert results.locator('.vlwb-card').count() == 5
    p.locator('.vlwb-cards[aria-label="queries to choose from"] .vlwb-card').nth(2).click(); state(lambda s: s['query'] == 2)
    p.locator('.vlwb-cards[aria-label="queries to choose from"] .vlwb-card').nth(2).focus(); p.keyboard.press('ArrowRight'); p.keyboard.press('Enter'); state(lambda s: s['query'] == 3)
    page.slide('.vlwb-retrieval .widget-slider', 2); state(lambda s: s['k'] == 7); p.wait_for_function('document.querySelectorAll(\'.vlwb-cards[aria-label="what sees shapes finds"] .vlwb-card\').length === 7')
    table = p.locator('.vlwb-table'); first = table.locator('tbody tr').first.inner_text()
    table.get_by_role('button', name='AP@R better in sees shapes').click(); state(lambda s: s['order_by'] == 'ap_gain'); p.wait_for_function('t => document.querySelector(".vlwb-table tbody tr").innerText !== t', arg=first)
    assert table.locator('th[aria-sort=descending]').count() == 1; p.keyboard.press('Enter'); state(lambda s: s['descending'] is False)
    table.locator('th[aria-sort=ascending]').wait_for() # the state is the kernel's: the rows are drawn a moment later
    row = table.locator('tbody tr').first; row.focus(); p.keyboard.press('ArrowDown'); p.keyboard.press('ArrowDown'); p.keyboard.press('Enter')
    want = int(table.locator('tbody tr').nth(2).inner_text().split(':')[0]); state(lambda s: s['query'] == want); p.wait_for_function('document.querySelectorAll(".vlwb-table tr[aria-selected=true]").length === 1')
    p.wait_for_timeout(600); page.shot(open_page.shots/f'retrieval-{where}.png')
    p.get_by_role('button', name='an image looks for captions').click(); state(lambda s: s['direction'] == 'i2t'); p.locator('.vlwb-cards.list[aria-label="what sees shapes finds"] .vlwb-card').first.wait_for()
    if where == 'lab': assert p.evaluate('window.jupyterapp.shell.currentWidget.content.widgets.length') == 2, 'no key reached JupyterLab'
    p.get_by_placeholder('a sentence of your own').fill('three red stars'); p.get_by_role('button', name='Ask both models').click(); state(lambda s: s['source'] == 'text' and s['text'] == 'three red stars'); p.get_by_text('Nobody has judged').wait_for()
    Image.new('RGB', (40, 30), 'red').save(tmp_path/'red.png')
    with p.expect_file_chooser() as chooser: p.locator('.vlwb-retrieval .widget-upload').click()
    chooser.value.set_files(str(tmp_path/'red.png')); state(lambda s: s['source'] == 'picture'); p.get_by_text('a picture of your own', exact=True).wait_for()
    p.locator('.vlwb-cards[aria-label="the query"] img').wait_for()


def test_dark_theme_and_speed(lab):
    page = lab([CELLS], dark=True, size=(1300, 1900)); p = page.page; p.locator('.vlwb-retrieval img.vlwb-photo').first.wait_for()
    p.get_by_role('button', name='an image looks for captions').click(); p.locator('.vlwb-cards.list[aria-label="what sees shapes finds"] .vlwb-card').first.wait_for(); p.wait_for_timeout(600)
    page.shot(lab.shots/'retrieval-dark.png')
    found = page.time_change('.vlwb-retrieval .noUi-handle', '.vlwb-cards[aria-label="what sees shapes finds"]', attribute='data-drawn', times=5)
    print('k moved:', sorted(round(f['frame']) for f in found), 'ms')
