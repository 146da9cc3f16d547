"""How do the producer and the consumers hand tiles to one another? A ring of buffers with two barriers each.

                 fill                                    wait_full
    producer  ──────────►  copy engine  ──────►  buffer  ───────────►  consumers
                 ▲                                                         │
                 └──────────────────────── release ────────────────────────┘

    full   an mbarrier: the copy engine counts the bytes that have landed; consumers wait for its phase, which
           is 0 in the first round through the ring, then 1, then 0 ...
    free   a named barrier: consumers arrive, and never wait there; the producer waits for all of them

Every buffer is free in the beginning: `release_all` says so, and `collect` takes back what nobody waits for
in the end, so that each barrier is left as it was found.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .instructions import aggregate, arrive, load_async, sync


@aggregate
class Place:
    """Where a role is in a ring: the buffer that comes next, and the phase of its round."""

    stage: gl.tensor
    phase: gl.tensor

    @gluon.constexpr_function
    def __init__(self, stage, phase):
        self.stage = stage
        self.phase = phase

    @gluon.jit
    def next(self, STAGES: gl.constexpr):
        stage = self.stage + 1
        is_around = stage == STAGES
        return Place(gl.where(is_around, 0, stage), gl.where(is_around, self.phase ^ 1, self.phase))


@gluon.jit
def place_at(stage):
    """The buffer `stage` in the first round."""
    return Place(gl.to_tensor(stage), gl.to_tensor(0))


@gluon.jit
def first_place():
    return place_at(0)


@gluon.jit
def tile_at(buffer, stage):
    """One of the tiles that a buffer [n, 1, 1, rows, columns] holds, [rows, columns]."""
    shape: gl.constexpr = buffer.shape
    return buffer.index(stage).reshape([shape[3], shape[4]])


@gluon.constexpr_function
def bytes_of(descriptors):
    """What the copy engine counts for all pieces of a tile."""
    return sum([each.block_type.nbytes for each in descriptors])


@gluon.constexpr_function
def columns_before(descriptors, i):
    """Where a piece begins among the columns."""
    return sum([each.block_type.shape[3] for each in [*descriptors][:i]])


@aggregate
class Ring:
    buffers: gl.tuple  # for each piece of a tile's columns, [stages, 1, 1, rows, columns]
    full: gl.shared_memory_descriptor  # [stages, 1]; where tiles are cleaned [2 stages, 1]
    FREE: gl.constexpr  # the named barrier of the first buffer; the others' follow
    STAGES: gl.constexpr
    THREADS: gl.constexpr  # of all consumers and the producer

    @gluon.constexpr_function
    def __init__(self, buffers, full, FREE, STAGES, THREADS):
        self.buffers = buffers
        self.full = full
        self.FREE = gl.constexpr(FREE)
        self.STAGES = gl.constexpr(STAGES)
        self.THREADS = gl.constexpr(THREADS)

    @gluon.jit
    def tile(self, place):
        """The buffer, in pieces of [rows, columns]."""
        pieces = ()
        for i in gl.static_range(len(self.buffers)):
            pieces = pieces + (tile_at(self.buffers[i], place.stage),)  # type: ignore[assignment]
        return pieces

    @gluon.jit
    def fill(self, place, descriptors, batch, head, row, is_unclean=False):
        """Producer: wait until the buffer is free, and have the rows that start at `row` copied into it, each
        piece by its descriptor. is_unclean: a consumer is told first, and tells the others by `share` that
        the buffer is full."""
        sync(self.FREE + place.stage, self.THREADS)
        return self.fill_free(place, descriptors, batch, head, row, is_unclean)

    @gluon.jit
    def fill_free(self, place, descriptors, batch, head, row, is_unclean=False):
        """The same for a buffer that is free: its consumers have released another ring's at this place."""
        signal = self.full.index(gl.where(is_unclean, self.STAGES, 0) + place.stage)
        mbarrier.expect(signal, bytes_of(descriptors))
        for i in gl.static_range(len(descriptors)):
            corner = [batch, head, row, columns_before(descriptors, i)]
            load_async(descriptors[i], corner, signal, self.buffers[i].index(place.stage))
        return place.next(self.STAGES)

    @gluon.jit
    def wait_unclean(self, place, phases):
        """The consumer that cleans: wait until an unclean tile has landed. Bit i of `phases` is the phase to
        wait for at buffer i, of which some rounds are clean; returned as they are afterwards."""
        mbarrier.wait(self.full.index(self.STAGES + place.stage), (phases >> place.stage) & 1)
        return phases ^ (1 << place.stage)

    @gluon.jit
    def share(self, place):
        """The consumer that cleans: what its threads have written is for everybody's matmuls to read."""
        fence_async_shared()
        mbarrier.arrive(self.full.index(place.stage))

    @gluon.jit
    def collect(self):
        """Producer: wait until every buffer is free."""
        for stage in gl.static_range(self.STAGES):
            sync(self.FREE + stage, self.THREADS)

    @gluon.jit
    def release_all(self):
        """Consumer, once, in the beginning."""
        for stage in gl.static_range(self.STAGES):
            arrive(self.FREE + stage, self.THREADS)

    @gluon.jit
    def wait_full(self, place, is_needed=True):
        """Consumer: wait until the buffer's tile has landed."""
        mbarrier.wait(self.full.index(place.stage), place.phase, is_needed)

    @gluon.jit
    def release(self, place):
        """Consumer: this warpgroup has read the buffer."""
        arrive(self.FREE + place.stage, self.THREADS)
        return place.next(self.STAGES)

    @gluon.jit
    def release_slot(self, place):
        """The same for a consumer that has a buffer of its own: its next tile comes into the same."""
        arrive(self.FREE + place.stage, self.THREADS)
        return Place(place.stage, place.phase ^ 1)


@gluon.jit
def buffer_for(descriptor, COUNT: gl.constexpr):
    """Room for so many of the tiles that it describes."""
    shape: gl.constexpr = descriptor.block_type.shape
    return gl.allocate_shared_memory(descriptor.dtype, [COUNT, 1, 1, shape[2], shape[3]], descriptor.layout)


@gluon.jit
def make_ring(
    descriptors,
    FREE: gl.constexpr,
    STAGES: gl.constexpr,
    THREADS: gl.constexpr,
    IS_CLEANED: gl.constexpr = False,
):
    """A ring for tiles whose pieces `descriptors` describe, its barriers ready for use."""
    buffers = ()
    for i in gl.static_range(len(descriptors)):
        buffers = buffers + (buffer_for(descriptors[i], STAGES),)  # type: ignore[assignment]
    SIGNALS: gl.constexpr = 2 * STAGES if IS_CLEANED else STAGES
    full = gl.allocate_shared_memory(gl.int64, [SIGNALS, 1], mbarrier.MBarrierLayout())
    for signal in gl.static_range(SIGNALS):
        mbarrier.init(full.index(signal), count=1)
    return Ring(buffers, full, FREE, STAGES, THREADS)
