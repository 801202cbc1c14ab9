//! One direction of one connection: whole frames, or bytes as they were written, on their way, each with the time at which
//! it arrives.
//!
//! Log streams keep their order, as TCP does. Questions and answers, which their protocol lets arrive in any order, are
//! also lost, doubled and overtaken when the weather says so: harsher than TCP, and closer to what Raft promises. Bytes without frames keep their order too.

use std::collections::VecDeque;
use std::task::Waker;

use rand::RngExt;
use rand::rngs::StdRng;

use crate::weather::Weather;

/// Bytes of the length before each frame.
const LENGTH_BYTES: usize = 4;
/// Bytes on their way on one direction, above which its writer waits.
const IN_FLIGHT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// A frame that waits for a blocked path.
const HELD: u64 = u64::MAX;

/// What arrives.
enum Item {
    Frame(Vec<u8>),
    End,
}

/// One direction.
pub(crate) struct Pipe {
    pub(crate) from: u64,
    pub(crate) to: u64,
    /// Whether what is written are frames of Raft's.
    framed: bool,
    /// Sorted by arrival; those that are held come last.
    queue: VecDeque<(u64, Item)>,
    /// Bytes of the next frame, until it is whole.
    partial: Vec<u8>,
    /// Bytes that arrived and were not read.
    arrived: VecDeque<u8>,
    frames: u64,
    last_ordered_ms: u64,
    bytes: usize,
    ended: bool,
    broken: bool,
    pub(crate) met: Met,
    pub(crate) reader: Option<Waker>,
    pub(crate) writer: Option<Waker>,
}

/// What befell frames on their way.
#[derive(Clone, Copy, Default)]
pub(crate) struct Met {
    pub(crate) held: u64,
    pub(crate) late: u64,
    pub(crate) lost: u64,
    pub(crate) doubled: u64,
    pub(crate) overtaken: u64,
}

/// What a reader finds.
pub(crate) enum Read {
    Bytes,
    End,
    Broken,
    Nothing,
}

impl Pipe {
    pub(crate) fn new(from: u64, to: u64, framed: bool) -> Self {
        Pipe {
            from,
            to,
            framed,
            queue: VecDeque::new(),
            partial: Vec::new(),
            arrived: VecDeque::new(),
            frames: 0,
            last_ordered_ms: 0,
            bytes: 0,
            ended: false,
            broken: false,
            met: Met::default(),
            reader: None,
            writer: None,
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    pub(crate) fn is_full(&self) -> bool {
        self.bytes > IN_FLIGHT_BYTES_MAX
    }

    /// Breaks the connection: nothing that is on its way arrives. Whom to wake.
    pub(crate) fn break_off(&mut self) -> impl Iterator<Item = Waker> {
        self.broken = true;
        self.queue.clear();
        self.arrived.clear();
        self.reader.take().into_iter().chain(self.writer.take())
    }

    /// Loses what is on its way and says nothing to anybody: the other end has no power.
    pub(crate) fn fall_silent(&mut self) {
        self.queue.clear();
        self.ended = true;
    }

    /// Takes bytes from the writer. Answers the arrivals that there will be.
    pub(crate) fn write(
        &mut self,
        bytes: &[u8],
        now_ms: u64,
        blocked: bool,
        weather: &Weather,
        rng: &mut StdRng,
    ) -> Vec<u64> {
        let mut arrivals = Vec::new();
        if self.ended {
            return arrivals;
        }
        if !self.framed {
            self.send(bytes.to_vec(), now_ms, blocked, weather, rng, &mut arrivals);
            return arrivals;
        }
        self.partial.extend_from_slice(bytes);
        while let Some(header) = self.partial.first_chunk::<LENGTH_BYTES>() {
            let length = LENGTH_BYTES + u32::from_le_bytes(*header) as usize;
            if self.partial.len() < length {
                break;
            }
            let rest = self.partial.split_off(length);
            let frame = std::mem::replace(&mut self.partial, rest);
            self.send(frame, now_ms, blocked, weather, rng, &mut arrivals);
        }
        arrivals
    }

    fn send(
        &mut self,
        frame: Vec<u8>,
        now_ms: u64,
        blocked: bool,
        weather: &Weather,
        rng: &mut StdRng,
        arrivals: &mut Vec<u64>,
    ) {
        // The greeting comes first; after it a question begins with 0 and an answer with 1 (`Frame` in raft).
        let loose = self.framed && self.frames > 0 && matches!(frame.get(LENGTH_BYTES), Some(0 | 1));
        self.frames += 1;
        let way = rng.random_range(weather.latency_ms.0..=weather.latency_ms.1);
        self.met.late += u64::from(way > Weather::CALM.latency_ms.1);
        self.met.held += u64::from(blocked);
        if !loose {
            self.last_ordered_ms = self.last_ordered_ms.max(now_ms + way);
            let due = if blocked { HELD } else { self.last_ordered_ms };
            return self.enqueue(due, Item::Frame(frame), arrivals);
        }
        if rng.random_bool(weather.lost) {
            self.met.lost += 1;
            return;
        }
        let late = |rng: &mut StdRng| {
            if weather.reorder_ms > 0 { rng.random_range(0..weather.reorder_ms) } else { 0 }
        };
        let due = |rng: &mut StdRng, this: &Self| {
            let floor = if weather.reorder_ms > 0 { 0 } else { this.last_ordered_ms };
            if blocked { HELD } else { (now_ms + way + late(rng)).max(floor) }
        };
        let doubled = rng.random_bool(weather.doubled);
        if doubled {
            self.met.doubled += 1;
            let again = due(rng, self);
            self.enqueue(again, Item::Frame(frame.clone()), arrivals);
        }
        let first = due(rng, self);
        if weather.reorder_ms == 0 && first != HELD {
            self.last_ordered_ms = first;
        }
        self.enqueue(first, Item::Frame(frame), arrivals);
    }

    fn enqueue(&mut self, due: u64, item: Item, arrivals: &mut Vec<u64>) {
        if let Item::Frame(frame) = &item {
            self.bytes += frame.len();
        }
        let place = self.queue.partition_point(|(other, _)| *other <= due);
        self.met.overtaken +=
            self.queue.iter().skip(place).filter(|(other, _)| *other != HELD).count() as u64;
        self.queue.insert(place, (due, item));
        if due != HELD {
            arrivals.push(due);
        }
    }

    /// The writer closed it.
    pub(crate) fn end(&mut self, now_ms: u64, blocked: bool) -> Vec<u64> {
        let mut arrivals = Vec::new();
        if !std::mem::replace(&mut self.ended, true) {
            self.last_ordered_ms = self.last_ordered_ms.max(now_ms + 1);
            let due = if blocked { HELD } else { self.last_ordered_ms };
            self.enqueue(due, Item::End, &mut arrivals);
        }
        arrivals
    }

    /// The path is open again: what was held is on its way.
    pub(crate) fn release(&mut self, now_ms: u64, rng: &mut StdRng) -> Vec<u64> {
        let due = self.last_ordered_ms.max(now_ms + rng.random_range(1..200));
        let mut arrivals = Vec::new();
        for (at, _) in self.queue.iter_mut().filter(|(at, _)| *at == HELD) {
            *at = due;
            arrivals.push(due);
        }
        if !arrivals.is_empty() {
            self.last_ordered_ms = due;
            self.queue.make_contiguous().sort_by_key(|(at, _)| *at);
        }
        arrivals
    }

    /// What arrives by now; for the trace, each frame's length and sum.
    pub(crate) fn arrive(&mut self, now_ms: u64, mut seen: impl FnMut(usize, u64)) -> bool {
        let mut any = false;
        while let Some((due, Item::Frame(_))) = self.queue.front()
            && *due <= now_ms
        {
            let Some((_, Item::Frame(frame))) = self.queue.pop_front() else { break };
            let sum = frame.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
                (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
            });
            seen(frame.len(), sum);
            self.arrived.extend(frame);
            any = true;
        }
        any || matches!(self.queue.front(), Some((due, Item::End)) if *due <= now_ms)
    }

    /// Hands arrived bytes to the reader.
    pub(crate) fn read(&mut self, now_ms: u64, into: &mut tokio::io::ReadBuf<'_>) -> Read {
        if self.broken {
            return Read::Broken;
        }
        if !self.arrived.is_empty() {
            let count = self.arrived.len().min(into.remaining());
            let (front, back) = self.arrived.as_slices();
            let first = front.len().min(count);
            into.put_slice(&front[..first]);
            into.put_slice(&back[..count - first]);
            self.arrived.drain(..count);
            self.bytes -= count;
            return Read::Bytes;
        }
        match self.queue.front() {
            Some((due, Item::End)) if *due <= now_ms => Read::End,
            _ => Read::Nothing,
        }
    }
}
