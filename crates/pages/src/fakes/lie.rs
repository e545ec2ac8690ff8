//! What a lying holder does instead of serving an extent. Lies about content (flipped, swapped, stale) are told by the store;
//! those here are told on the wire.

use std::ops::ControlFlow;
use std::time::Duration;

use bytes::Bytes;
use quinn::SendStream;
use types::ExtentIndex;

use crate::wire::{EXTENT_BYTES, Encoding, ExtentHeader, ExtentId};

/// A way to answer wrongly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// One bit of the content is flipped.
    Flipped,
    /// The content is that of another extent.
    Swapped,
    /// The content is what the extent had in an older image.
    Stale,
    /// The content ends after half of it, and so does the answer.
    Truncated,
    /// An extent that was not asked for comes first.
    Unsolicited,
    /// Nothing comes, and the answer does not end.
    Silent,
    /// It comes late by so much.
    Slow(Duration),
    /// Bytes that are no frame come.
    Garbage,
    /// The extent comes twice.
    Twice,
    /// An lz4 block that decompresses to more than an extent comes.
    Bomb,
}

impl Lie {
    /// Tells the lie, if it is one of the wire; says whether the answer ends with it.
    pub(crate) async fn tell(self, send: &mut SendStream, id: ExtentId) -> ControlFlow<()> {
        let extent = |id, encoding, payload: &[u8]| -> Bytes {
            [&ExtentHeader { id, encoding }.encode(payload.len()), payload].concat().into()
        };
        let data = vec![0x5A; EXTENT_BYTES];
        let (frame, flow) = match self {
            Self::Flipped | Self::Swapped | Self::Stale => return ControlFlow::Continue(()),
            Self::Slow(late) => {
                tokio::time::sleep(late).await;
                return ControlFlow::Continue(());
            }
            Self::Silent => {
                // Until the reader has gone or cancels.
                let _ = send.stopped().await;
                return ControlFlow::Break(());
            }
            Self::Unsolicited => {
                let other = ExtentId { extent: ExtentIndex(id.extent.0 ^ 1), ..id };
                (extent(other, Encoding::Raw, &data), ControlFlow::Continue(()))
            }
            Self::Twice => {
                let once = extent(id, Encoding::Zero, &[]);
                ([&once[..], &once].concat().into(), ControlFlow::Break(()))
            }
            Self::Truncated => (extent(id, Encoding::Raw, &data).slice(..EXTENT_BYTES / 2), ControlFlow::Break(())),
            Self::Garbage => (Bytes::from(data), ControlFlow::Break(())),
            Self::Bomb => {
                let bomb = lz4_flex::block::compress(&vec![0; 64 * EXTENT_BYTES]);
                (extent(id, Encoding::Lz4, &bomb), ControlFlow::Break(()))
            }
        };
        // A reader that has gone was lied to in vain.
        let _ = send.write_chunk(frame).await;
        if flow.is_break() {
            let _ = send.finish();
            let _ = send.stopped().await;
        }
        flow
    }
}
