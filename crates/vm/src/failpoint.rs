//! Failpoints: named places in the engine where a test can make it fail as a full disk or a lack of memory would.
//!
//! Armed per process, so tests that use them run in a process of their own (as nextest runs all).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

static ARMED: Mutex<Armed> = Mutex::new(Armed { points: BTreeMap::new(), lottery: None });

struct Armed {
    points: BTreeMap<&'static str, Point>,
    lottery: Option<Lottery>,
}

struct Point {
    /// Hits to let pass first.
    skip: u32,
    errno: i32,
}

struct Lottery {
    dice: fastrand::Rng,
    one_in: u32,
    errno: i32,
}

/// Disarms everything when dropped.
#[must_use = "the failpoints are disarmed when this is dropped"]
#[derive(Debug)]
pub struct Guard(());

/// Makes the hit after `skip` hits of `name` fail, once, with the error number `errno`.
pub fn arm(name: &'static str, skip: u32, errno: i32) -> Guard {
    lock().points.insert(name, Point { skip, errno });
    Guard(())
}

/// Makes every hit of every failpoint fail with a chance of one in `one_in`, reproducibly by `seed`.
pub fn arm_all(seed: u64, one_in: u32, errno: i32) -> Guard {
    lock().lottery = Some(Lottery { dice: fastrand::Rng::with_seed(seed), one_in, errno });
    Guard(())
}

/// Passes a failpoint. For the macro `failpoint!`.
///
/// # Errors
/// The armed one.
pub fn hit(name: &'static str) -> io::Result<()> {
    let mut armed = lock();
    if let Some(point) = armed.points.get_mut(name) {
        if point.skip == 0 {
            let errno = point.errno;
            armed.points.remove(name);
            return Err(io::Error::from_raw_os_error(errno));
        }
        point.skip -= 1;
    }
    if let Some(lottery) = &mut armed.lottery
        && lottery.dice.u32(0..lottery.one_in) == 0
    {
        return Err(io::Error::from_raw_os_error(lottery.errno));
    }
    Ok(())
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut armed = lock();
        armed.points.clear();
        armed.lottery = None;
    }
}

fn lock() -> MutexGuard<'static, Armed> {
    ARMED.lock().unwrap_or_else(PoisonError::into_inner)
}
