//! x
/// x
#[derive(Debug)]
pub struct Host;
impl Host {
    /// x
    pub fn run_in(&self) {}
}
