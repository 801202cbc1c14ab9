//! The follow stream as an agent reads it: whatever is a frame is the same frame when it is encoded and read again.
#![no_main]

use holdfast_client::frames::{FrameBuffer, encode};
use holdfast_model::agent::{EdgeRoute, Followed, NodeInstance};
use libfuzzer_sys::fuzz_target;

fn read<T: Followed>(bytes: &[u8]) {
    let mut buffer = FrameBuffer::new();
    // In two pieces: what is cut must not matter.
    let (one, two) = bytes.split_at(bytes.len() / 2);
    for piece in [one, two] {
        buffer.extend(piece);
        while let Ok(Some(frame)) = buffer.next_frame::<T>() {
            if let Ok(wire) = encode(&frame) {
                let mut again = FrameBuffer::new();
                again.extend(&wire);
                assert_eq!(again.next_frame::<T>(), Ok(Some(frame)));
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    read::<EdgeRoute>(bytes);
    read::<NodeInstance>(bytes);
});
