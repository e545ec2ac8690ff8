//! Holders that answer wrongly: what can be seen without the digests is an error of that holder, the rest comes as it is.

use std::time::{Duration, Instant};

use pages::LinkError;
use pages::client::Misbehaviour;
use pages::fakes::{Lie, MemoryImage, OpenGate};
use pages::wire::{BadFrame, Content};
use types::{Digest, ExtentIndex, Tenant};

use crate::common::{Holder, fetch, id, request};

#[tokio::test(flavor = "multi_thread")]
async fn lies_on_the_wire_are_errors_of_the_liar_and_lies_of_content_fail_the_digest() {
    let image = MemoryImage::patterned(Tenant::default_tenant(), 64);
    let holder = Holder::of(OpenGate, [image.clone()]);
    let (_reader, link) = holder.reader(&["default"]);
    let lease = link.open(&Tenant::default_tenant(), image.digest(), Duration::from_secs(20)).await.unwrap().lease;
    // 18, then the extent that is lied about, then one more.
    let asked = request(&lease, image.digest(), [18, 22, 26]);
    let true_digest = Digest::of(image.extent(ExtentIndex(22)).unwrap());
    let lies = [
        Lie::Flipped,
        Lie::Swapped,
        Lie::Stale,
        Lie::Slow(Duration::from_millis(50)),
        Lie::Truncated,
        Lie::Unsolicited,
        Lie::Garbage,
        Lie::Twice,
        Lie::Bomb,
    ];
    for lie in lies {
        holder.store.lie_about(id(22), Some(lie));
        let (answers, end) = fetch(&link, &asked).await;
        let ids: Vec<_> = answers.iter().map(|answer| answer.id.extent.0).collect();
        match lie {
            Lie::Flipped | Lie::Swapped | Lie::Stale | Lie::Slow(_) => {
                end.unwrap();
                assert_eq!(ids, [18, 22, 26], "{lie:?}");
                let Content::Data(data) = &answers[1].content else { panic!("{lie:?}: no data") };
                assert_eq!(Digest::of(data) == true_digest, matches!(lie, Lie::Slow(_)), "{lie:?}");
            }
            _ => {
                let Err(LinkError::Broken(misbehaviour)) = end else { panic!("{lie:?}: {end:?}") };
                let is_expected = match lie {
                    Lie::Truncated => misbehaviour == Misbehaviour::Frame(BadFrame::Truncated),
                    Lie::Unsolicited => misbehaviour == Misbehaviour::Unsolicited(id(23)),
                    Lie::Twice => misbehaviour == Misbehaviour::Unsolicited(id(22)),
                    Lie::Bomb => misbehaviour == Misbehaviour::Frame(BadFrame::Lz4),
                    _ => misbehaviour == Misbehaviour::Frame(BadFrame::NoMagic),
                };
                assert!(is_expected, "{lie:?}: {misbehaviour}");
                assert_eq!(ids.first(), Some(&18), "what came before is good");
            }
        }
    }
    holder.store.lie_about(id(22), None);
    fetch(&link, &asked).await.1.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_holder_costs_no_more_than_the_deadline() {
    let image = MemoryImage::patterned(Tenant::default_tenant(), 64);
    let holder = Holder::of(OpenGate, [image.clone()]);
    let (_reader, link) = holder.reader(&["default"]);
    let lease = link.open(&Tenant::default_tenant(), image.digest(), Duration::from_secs(20)).await.unwrap().lease;
    holder.store.lie_about(id(3), Some(Lie::Silent));
    let within = Duration::from_millis(300);
    let start = Instant::now();
    let end = link.extents(&request(&lease, image.digest(), [3]), within, |_| {}).await;
    assert_eq!(end, Err(LinkError::TimedOut { within }));
    assert!(start.elapsed() < Duration::from_secs(5));
    // The connection is as good as before.
    fetch(&link, &request(&lease, image.digest(), [2])).await.1.unwrap();
}
