//! R9: the source of pages is lost, cut off, or its link corrupts, while a child works. A short version, which says how things
//! end and after how long; the tests do it by the thousand, with holders that lie.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use chaos::relay::{Impairment, Probability};

use super::Run;
use super::bed::{Bed, Site, touch_by};
use super::workload::WorkingSet;
use crate::report::{Report, Row, Samples, announce};

const MIB: u64 = 64;
/// How long a child waits for a page, and what its end may take besides.
const DEADLINE: &str = "2s";
const LIMIT: Duration = Duration::from_secs(2 + 3);
const PACE_MBIT: u64 = 50;

#[derive(Clone, Copy, Debug)]
enum Injury {
    Killed,
    Cut,
    Corrupting,
}

pub(super) fn run(report: &mut Report, bed: &Bed, run: &Run) -> Result<()> {
    let options: &[&str] = &["--no-stream", "--page-deadline", DEADLINE];
    let [mut here, mut there] = bed.sites([options, options])?;
    let set = WorkingSet::of(MIB)?;
    let mut dice = fastrand::Rng::with_seed(9);
    let mut ends: BTreeMap<String, u64> = BTreeMap::new();
    let mut took = Vec::new();
    let injuries = run.n(3, 21);
    for number in 0..injuries {
        let injury = [Injury::Killed, Injury::Cut, Injury::Corrupting][number % 3];
        announce(&format!("R9: {injury:?}, {} of {injuries}", number + 1));
        let (_, digest) = here.load(&bed.images, MIB)?;
        let chance = Probability::new(0.02)?;
        let relay = bed.impaired(0, here.address, Impairment::default())?;
        let opened = there.open(&digest, &[relay.address()], 1)?;
        bed.set_rate(1, Some(PACE_MBIT))?;
        let mut connection = there.daemon.connect()?;
        let wait = Duration::from_millis(dice.u64(20..300));
        let (outcome, lasted) = std::thread::scope(|scope| -> Result<_> {
            let work = scope.spawn(|| (touch_by(&mut connection, &opened.ids[0], &set), Instant::now()));
            std::thread::sleep(wait);
            let began = Instant::now();
            match injury {
                Injury::Killed => here.daemon.kill()?,
                Injury::Cut => bed.network.set_link(0, false)?,
                Injury::Corrupting => {
                    let both = Impairment { corrupt: chance, ..Impairment::default() };
                    relay.set(chaos::relay::Direction::ToClient, both);
                    relay.set(chaos::relay::Direction::ToUpstream, both);
                }
            }
            let (outcome, ended) = work.join().expect("it does not panic");
            Ok((outcome, ended.saturating_duration_since(began)))
        })?;
        bed.network.set_link(0, true)?;
        bed.set_rate(1, None)?;
        let end = match &outcome {
            Ok(_) => "complete, every byte right".to_owned(),
            Err(error) if format!("{error:#}").contains("PAGE_SOURCE_LOST") => "PAGE_SOURCE_LOST".to_owned(),
            Err(error) => bail!("{injury:?}: neither complete nor typed: {error:#}"),
        };
        ensure!(outcome.is_ok() || lasted < LIMIT, "{injury:?}: it took {lasted:?} to end");
        *ends.entry(format!("{injury:?}: {end}")).or_default() += 1;
        took.push(lasted);
        there.kill_all()?;
        there.daemon.ask("DELETE", &format!("/v1/images/{}", opened.image), "")?;
        if matches!(injury, Injury::Killed) {
            let certificate = there.certificate.clone();
            here = bed.again(0, here, options)?;
            here.trust(&certificate)?;
        } else {
            forget_all(&mut here)?;
        }
        std::thread::sleep(Duration::from_millis(1300));
    }
    let list: Vec<String> = ends.iter().map(|(end, count)| format!("{end}: {count}")).collect();
    report.note(format!("R9: {injuries} injuries, 0 wrong bytes, 0 hangs; {}", list.join("; ")));
    let took = Samples::of(&took);
    report.keep("R9 injury to end", &took);
    let what = format!("source killed, cut off or corrupting ({injuries}): injury to the end, page deadline {DEADLINE}");
    report.add(Row::new("R9", what, &took, None).reaching("0 wrong, 0 hangs", true));
    Ok(())
}

fn forget_all(site: &mut Site) -> Result<()> {
    let image = site.only_image()?;
    site.daemon.ask("DELETE", &format!("/v1/images/{image}"), "")?;
    Ok(())
}
