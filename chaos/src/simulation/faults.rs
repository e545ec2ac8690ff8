//! What goes wrong.

use std::collections::BTreeMap;

use control::{Command, Tick};

use super::clients::Clients;
use super::{World, node_id};

/// The longest that a request is on its way, and some more.
const SLOWEST_MS: u64 = 25_000;

/// See the module.
#[derive(Default)]
pub(super) struct Faults {
    /// By kind.
    pub(super) counts: BTreeMap<&'static str, u64>,
    next: Tick,
    heals: Option<Tick>,
    has_revoked: bool,
}

impl Faults {
    pub(super) fn step(&mut self, world: &mut World, clients: &mut Clients) {
        let now = world.now;
        if self.heals.is_some_and(|heals| heals <= now) {
            self.heals = None;
            heal(world);
        }
        if self.next > now {
            return;
        }
        self.next = Tick(now.0 + world.dice.u64(300..6000));
        let nodes = world.agents.len();
        let node = world.dice.usize(..nodes);
        let for_some_time = [200, 2000, 8000, 20_000][world.dice.usize(..4)];
        let until = Tick(now.0 + world.dice.u64(50..for_some_time));
        let kind = match world.dice.u8(0..16) {
            0..=4 => {
                world.agents[node].crash_until(until);
                "crash"
            }
            5..=7 => {
                world.agents[node].stop_until(until);
                "stop"
            }
            8 => {
                (0..nodes).for_each(|node| world.agents[node].crash_until(until));
                "all crash"
            }
            9..=12 => {
                let side: Vec<bool> = (0..nodes).map(|_| world.dice.bool()).collect();
                for from in 0..nodes {
                    for to in 0..nodes {
                        world.cut[from][to] = side[from] != side[to];
                    }
                }
                self.heals = Some(until);
                "partition"
            }
            13..=14 => {
                let other = world.dice.usize(..nodes);
                world.cut[node][other] = node != other;
                self.heals = Some(until);
                "one way"
            }
            // At least three stay: what any two of them have to keep finds room beside what runs.
            _ if nodes > 4 && !self.has_revoked => {
                self.has_revoked = true;
                let node = node_id(node);
                let is_removed = world.dice.bool();
                clients.ask(now, if is_removed { Command::Remove { node } } else { Command::Revoke { node } });
                if is_removed { "remove" } else { "revoke" }
            }
            _ => return,
        };
        *self.counts.entry(kind).or_default() += 1;
    }

    /// No more of it.
    pub(super) fn end(&mut self, world: &mut World, clients: &mut Clients) {
        heal(world);
        // What was asked for before may still be on its way.
        clients.forget_cordons();
        let later = Tick(world.now.0 + SLOWEST_MS);
        for node in 0..world.agents.len() {
            world.agents[node].go_on();
            clients.ask(later, Command::Cordon { node: node_id(node), is_cordoned: false });
            clients.ask(later, Command::Drain { node: node_id(node), is_draining: false });
        }
    }
}

fn heal(world: &mut World) {
    world.cut.iter_mut().for_each(|row| row.fill(false));
}
