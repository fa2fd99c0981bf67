"The matrix canvas and the similarity-matrix explorer: state and controls without a browser, then in JupyterLab and voila."
import json, time
import numpy as np
import pytest
import torch
from vlwb.bench import browser
from vlwb.core import make_generator
from vlwb.data.pairs import Pairs
from vlwb.widgets.explorer import Explorer, ExplorerState, cluster_order, mark_names, pair_facts
from vlwb.widgets.gallery import Gallery
from vlwb.widgets.matrix import NO_VALUE, MatrixCanvas, quantise

HOSTILE = ['<script>alert(1)</script>', '<img src=x onerror=alert(2)>', 'صورة قطة على السطح', 'very long ' * 200]


def unit(n, d=8, seed=0): return torch.nn.functional.normalize(torch.randn(n, d, generator=make_generator(seed)), dim=1)


def gallery(n=6, per=2, captions=None, images=None, **more):
    m = n * per
    pairs = Pairs([f'photo <{i}>' for i in range(n)], captions or [f'caption {j}' for j in range(m)], [str(j) for j in range(m)], np.repeat(np.arange(n), per), images)
    return Gallery(pairs, unit(n), unit(m, seed=1), **more)


def test_nan_similarities_have_no_colour_and_are_never_suspects():
    good, broken = gallery(), unit(6)
    broken[2, 3] = float('nan')
    g = Gallery(good.pairs, broken, good.text_features)
    explorer = Explorer(g)
    assert '1 images have features that are not finite' in explorer.readout.value
    layer = explorer.canvas._data['similarity'][0]
    assert (layer[2] == NO_VALUE).all() and (layer[0] != NO_VALUE).all()
    explorer.state.threshold = -2.
    assert explorer.state.counts()['suspects'] == 5*12 - 10       # every unlabelled pair of the other five images
    explorer.canvas.cell = [2, 0]
    assert 'no similarity' in explorer.cards.cards[0]['note'] and explorer.selected.rank_in_row.isna().all()
    explorer.figure()


def test_missing_picture_files_and_hostile_captions_stay_text(tmp_path):
    explorer = Explorer(gallery(2, 2, captions=HOSTILE, images=[tmp_path/'none.jpg', tmp_path/'neither.png']))
    explorer.canvas.cell = [0, 1]
    assert explorer.cards.cards[0]['texts'][0]['text'] == HOSTILE[1]
    assert explorer.canvas.column_names[0] == HOSTILE[0] and len(explorer.canvas.column_names[3]) <= 90
    assert explorer.state.gallery.thumbnails(0) == b''
    assert '<' not in explorer.readout.value and '<script' not in explorer.note.value


def test_order_by_class_keeps_labelled_pairs_together():
    g = gallery(classes=np.array([2, 0, 1, 0, 2, 1]))
    explorer = Explorer(g); explorer.order.value = 'class'
    rows, columns = (np.frombuffer(o, np.int32) for o in (explorer.canvas.row_order, explorer.canvas.column_order))
    assert rows.tolist() == [1, 3, 2, 5, 0, 4] and (np.repeat(rows, 2) == g.pairs.caption_image[columns]).all()
    assert 'class' not in Explorer(gallery()).order.options


def test_a_second_view_is_a_layer_and_can_weigh():
    g = gallery(aux_image_features=unit(6, 4, 5), aux_text_features=unit(12, 4, 6))
    state = ExplorerState(g)
    own = state.weights(); state.alpha = 1.
    assert not torch.equal(own, state.weights())
    state.layer = 'second view'
    torch.testing.assert_close(state.values(), g.aux_image_features @ g.aux_text_features.T)


def test_selection_is_a_table_with_every_pair_once():
    explorer = Explorer(gallery(), threshold=-1.)
    explorer.strong.click(); explorer.strong.click()
    table = explorer.selected
    assert len(table) == 20 and not table.own.any() and table.similarity.is_monotonic_decreasing
    assert not table.duplicated(['image', 'text']).any()


def test_the_kernel_holds_at_most_twice_the_matrix():
    import tracemalloc
    n = 1500
    g = Gallery(Pairs([str(i) for i in range(n)], [''] * n, [str(j) for j in range(n)], np.arange(n)), unit(n, 32), unit(n, 32, 1))
    matrix = g.similarity
    explorer = Explorer(g)
    held = sum(layer.numel() for layer, _, _ in explorer.canvas._data.values()) + g.own.numel()
    assert matrix.numel()*4 + held <= 2 * matrix.numel()*4


def test_clusters_are_a_function_of_features_and_seed():
    f = torch.cat([unit(20, 8, s)*.05 + torch.eye(8)[s] for s in range(3)])
    f = torch.nn.functional.normalize(f, dim=1)[torch.randperm(60, generator=make_generator(1))]
    order = cluster_order(f, 3)
    label = f[:, :3].argmax(1).numpy()[order]
    assert (np.diff(label) != 0).sum() == 2             # three blocks
    assert (cluster_order(f, 3) == order).all()
    with pytest.raises(ValueError, match='NaN'): cluster_order(f*float('nan'))


SETUP = r'''
import numpy as np, torch
from vlwb.core import make_generator
from vlwb.data.pairs import Pairs
from vlwb.widgets.explorer import Explorer
from vlwb.widgets.gallery import Gallery
unit = lambda n, s: torch.nn.functional.normalize(torch.randn(n, 16, generator=make_generator(s)), dim=1)
n = 60
pictures = np.random.default_rng(0).integers(0, 255, (n, 24, 32, 3)).astype(np.uint8)
texts = [f'caption {j}' for j in range(n)]; texts[7] = '<script>alert(1)</script><b>bold?</b>'; texts[8] = 'صورة قطة على السطح'
explorer = Explorer(Gallery(Pairs([f'img {i}' for i in range(n)], texts, [str(j) for j in range(n)], np.arange(n), pictures), unit(n, 0), unit(n, 1)))
explorer.threshold.add_class('threshold')
'''


@pytest.mark.parametrize('where, dark', [('lab', False), ('voila', True)])
def test_in_the_browser(where, dark, request, tmp_path):
    open_page = request.getfixturevalue(where)
    page = open_page([SETUP, browser.watch('explorer.state', ['cell', 'threshold', 'layer'], tmp_path/'state.json'), 'explorer'], dark=dark)
    p, canvas = page.page, '.vlwb-matrix canvas'
    p.locator(f'{canvas}[data-whole="1"]').wait_for()
    start = browser.wait_state(tmp_path/'state.json')
    first = page.pixels(canvas)
    page.slide('.threshold', 3)                         # the kernel's state and the counts follow
    assert browser.wait_state(tmp_path/'state.json', lambda s: s['threshold'] > start['threshold'])
    p.get_by_label('fade the rest').check()
    faded = page.wait_pixels(canvas, first)
    p.locator('.widget-dropdown select').first.select_option('weight')
    assert browser.wait_state(tmp_path/'state.json', lambda s: s['layer'] == 'weight')
    page.wait_pixels(canvas, faded)

    box = p.locator(canvas).bounding_box()              # a click at image 3, caption 7
    p.mouse.click(box['x'] + box['width']*7.5/60, box['y'] + box['height']*3.5/60)
    assert browser.wait_state(tmp_path/'state.json', lambda s: s['cell'])['cell'] == [3, 7]
    p.locator('.vlwb-card', has_text='<script>alert(1)</script><b>bold?</b>').first.wait_for()
    p.locator('img.vlwb-photo').first.wait_for()
    assert p.locator('.vlwb-card b').count() == 0 == p.locator('.vlwb-tip b').count()

    p.locator(canvas).focus(); p.keyboard.press('ArrowRight'); p.keyboard.press('Enter')
    assert browser.wait_state(tmp_path/'state.json', lambda s: s['cell'] == [3, 8])
    view = p.locator(canvas).get_attribute('data-view'); before = page.pixels(canvas)
    p.mouse.move(box['x'] + box['width']/2, box['y'] + box['height']/2); p.mouse.wheel(0, -60)
    page.wait_pixels(canvas, before)                    # zoomed in the browser
    assert p.locator(canvas).get_attribute('data-view') != view
    p.wait_for_timeout(300); page.shot(open_page.shots/f'explorer-{where}{"-dark"*dark}.png')


def test_real_photos_with_truth_in_part():
    "coco_mini: photos from files, its ratings as truth, most pairs looked at by nobody."
    from vlwb.core import data_folder
    from vlwb.data.pairs import read_pairs
    from vlwb.data.relevance import own_captions, read_cxc, union
    folder = data_folder()
    if folder is None: pytest.skip('VLWB_DATA names no folder with coco_mini')
    folder = folder/'coco_mini'
    pairs = read_pairs(folder/'images.jsonl')
    truth = union(own_captions(pairs), read_cxc(folder/'cxc'/'sits_ours.tsv', pairs)).restrict(pairs)
    n, m = pairs.num_images, len(pairs)
    explorer = Explorer(Gallery(pairs, unit(n, 16), unit(m, 16, 1), truth), threshold=-1.)
    counts, known = explorer.state.counts(), truth.known.nnz - m
    assert counts['matches'] + counts['non_matches'] == known > 0 and counts['unknown'] == n*m - m - known
    assert 'nobody looked' in explorer.readout.value
    explorer.canvas.cell = [0, m - 1]
    assert [b['text'] for b in explorer.cards.cards[0]['badges']] == ['nobody looked', 'suspect']
    assert explorer.state.gallery.thumbnails(0)[:2] == b'\xff\xd8'


def test_an_exported_page_shows_captions_as_text_and_views_as_pictures(chromium, tmp_path):
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter
    sources = ["import os; os.environ['VLWB_STATIC'] = '1'", SETUP + 'None', 'explorer.state.cell = [3, 7]; explorer.selected', 'explorer']
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
    NotebookClient(notebook, store_widget_state=False, timeout=120).execute()
    assert 'widget-view' not in nbformat.writes(notebook)
    (tmp_path/'page.html').write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding='utf-8')
    page, said = chromium.browser.new_context(offline=True).new_page(), []
    page.on('dialog', lambda d: (said.append(d.message), d.dismiss()))
    page.goto((tmp_path/'page.html').as_uri(), wait_until='domcontentloaded')
    page.locator('table', has_text='<script>alert(1)</script><b>bold?</b>').first.wait_for()
    assert page.locator('img').count() >= 1 and page.locator('table b').count() == 0 and not said
    page.context.close()
