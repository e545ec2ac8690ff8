//! What CPU an image was made on, and whether this host may resume it. Registers and CPUID answers are part of an image, so a
//! guest that resumes on another CPU would find features gone that it already uses.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::Digest;

/// The CPU of a host as its guests see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuProfile {
    /// The 12 characters of CPUID leaf 0, for example `GenuineIntel`.
    pub vendor: String,
    /// Display family (CPUID leaf 1).
    pub family: u16,
    /// Display model (CPUID leaf 1).
    pub model: u16,
    /// Digest of every CPUID entry that guests are given, less what differs between vCPUs or boots.
    pub cpuid: Digest,
    /// Rate of the time stamp counter, in kHz.
    pub tsc_khz: u32,
}

impl CpuProfile {
    /// How far the two counters' rates may lie apart, in parts per million: the tolerance that KVM itself applies before it
    /// scales. Two boots of one host measure rates that differ by a few.
    pub const TSC_TOLERANCE_PPM: u64 = 250;

    /// Whether a guest frozen on `self` may resume on `host`.
    ///
    /// # Errors
    /// [`ForeignCpu`] names the first difference.
    pub fn check_resumable_on(&self, host: &Self) -> Result<(), ForeignCpu> {
        let difference = if (&self.vendor, self.family, self.model) != (&host.vendor, host.family, host.model) {
            Difference::Model
        } else if self.cpuid != host.cpuid {
            Difference::Features
        } else if !rates_agree(self.tsc_khz, host.tsc_khz) {
            Difference::TscRate
        } else {
            return Ok(());
        };
        Err(ForeignCpu { image: Box::new(self.clone()), host: Box::new(host.clone()), difference })
    }
}

impl fmt::Display for CpuProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let features = &self.cpuid.to_string()[..8];
        write!(f, "{} family {} model {} features {features} at {} kHz", self.vendor, self.family, self.model, self.tsc_khz)
    }
}

/// An image that another CPU must resume.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("the image was made on {image}; this host is {host} ({difference}); fork it on a host with the CPU of the image")]
pub struct ForeignCpu {
    /// Profile in the image.
    pub image: Box<CpuProfile>,
    /// Profile of the host that was asked to resume it.
    pub host: Box<CpuProfile>,
    /// The first thing that differs.
    pub difference: Difference,
}

/// What differs between two profiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// Vendor, family or model.
    Model,
    /// The CPUID answers.
    Features,
    /// The time stamp counter's rate, by more than [`CpuProfile::TSC_TOLERANCE_PPM`].
    TscRate,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "another model",
            Self::Features => "other CPU features",
            Self::TscRate => "another TSC rate",
        })
    }
}

fn rates_agree(a_khz: u32, b_khz: u32) -> bool {
    let apart = u64::from(a_khz.abs_diff(b_khz));
    apart * 1_000_000 <= u64::from(a_khz.min(b_khz)) * CpuProfile::TSC_TOLERANCE_PPM
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> CpuProfile {
        CpuProfile { vendor: "GenuineIntel".into(), family: 6, model: 143, cpuid: Digest::of(b"cpuid"), tsc_khz: 2_000_000 }
    }

    #[test]
    fn each_difference_is_named() {
        let image = profile();
        let differs = |host: CpuProfile| image.check_resumable_on(&host).unwrap_err().difference;
        assert_eq!(differs(CpuProfile { model: 1, ..profile() }), Difference::Model);
        assert_eq!(differs(CpuProfile { vendor: "AuthenticAMD".into(), ..profile() }), Difference::Model);
        assert_eq!(differs(CpuProfile { cpuid: Digest::of(b"other"), ..profile() }), Difference::Features);
        assert_eq!(differs(CpuProfile { tsc_khz: 2_000_501, ..profile() }), Difference::TscRate);
        assert_eq!(image.check_resumable_on(&CpuProfile { tsc_khz: 2_000_500, ..profile() }), Ok(()));
        assert_eq!(differs(CpuProfile { tsc_khz: 0, ..profile() }), Difference::TscRate);
    }
}
