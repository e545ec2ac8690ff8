//! A disk (virtio 1.2, section 5.2) over a region of the machine. What is written is private to the machine and is memory;
//! flush does nothing, since there is nothing that would outlive the machine.

use std::io::{Read, Write};

use virtio_queue::{Queue, Reader, Writer};
use vm_memory::Bytes;

use super::{BadQueue, VirtioDevice, each_chain, reader, used_len, writer};
use crate::device::BadDeviceState;
use crate::sys::guest_memory::{DiskMemory, Ram};

const SECTOR: u64 = 512;
/// Bytes that are copied at a time.
const PIECE: usize = 64 << 10;
/// The most bytes of one request: what a guest's driver makes at most, many times over.
const REQUEST_MAX: u64 = 64 << 20;
/// The most buffers of a request, less header and status.
const SEGMENTS_MAX: u32 = 126;

const F_SEG_MAX: u64 = 1 << 2;
const F_FLUSH: u64 = 1 << 9;
const F_WRITE_ZEROES: u64 = 1 << 14;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const WRITE_ZEROES: u32 = 13;

/// The byte with which each request ends.
#[derive(Clone, Copy)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Disk {
    bytes: u64,
    /// From when the machine has its memory.
    memory: Option<DiskMemory>,
    piece: Vec<u8>,
}

impl Disk {
    pub(crate) fn new(bytes: u64) -> Self {
        Self { bytes, memory: None, piece: Vec::new() }
    }

    pub(crate) fn set_memory(&mut self, memory: Option<DiskMemory>) {
        self.memory = memory;
    }

    /// Does what a request asks for. How many bytes were written into `room`, and how it went.
    fn serve(&mut self, request: &mut Reader<'_>, room: &mut Writer<'_>) -> Result<(usize, Status), BadQueue> {
        let mut header = [0; 16];
        if request.read_exact(&mut header).is_err() {
            return Ok((0, Status::IoError));
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let (_, sector) = header.split_at(8);
        let sector = sector.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        match kind {
            IN => self.read(sector, room),
            OUT => Ok((0, self.write(sector, request)?)),
            FLUSH => Ok((0, Status::Ok)),
            GET_ID => {
                let mut id = [0; 20];
                id[..7].copy_from_slice(b"farfork");
                let len = room.available_bytes().min(id.len());
                room.write_all(&id[..len])?;
                Ok((len, Status::Ok))
            }
            WRITE_ZEROES => Ok((0, self.write_zeroes(request)?)),
            _ => Ok((0, Status::Unsupported)),
        }
    }

    /// Where a request for so many bytes lies, if all of it is on the disk.
    fn place(&self, sector: u64, bytes: u64) -> Option<u64> {
        let at = sector.checked_mul(SECTOR)?;
        let is_whole = bytes.is_multiple_of(SECTOR) && bytes <= REQUEST_MAX;
        (is_whole && at.checked_add(bytes)? <= self.bytes).then_some(at)
    }

    fn read(&mut self, sector: u64, room: &mut Writer<'_>) -> Result<(usize, Status), BadQueue> {
        let wanted = room.available_bytes();
        let (Some(at), Some(memory)) = (self.place(sector, wanted as u64), &self.memory) else {
            return Ok((0, Status::IoError));
        };
        let mut done = 0;
        while done < wanted {
            let piece = &mut self.piece[..PIECE.min(wanted - done)];
            if memory.read_slice(piece, vm_memory::GuestAddress(at + done as u64)).is_err() {
                return Ok((done, Status::IoError));
            }
            room.write_all(piece)?;
            done += piece.len();
        }
        Ok((done, Status::Ok))
    }

    fn write(&mut self, sector: u64, data: &mut Reader<'_>) -> Result<Status, BadQueue> {
        let wanted = data.available_bytes();
        let (Some(at), Some(memory)) = (self.place(sector, wanted as u64), &self.memory) else {
            return Ok(Status::IoError);
        };
        let mut done = 0;
        while done < wanted {
            let piece = &mut self.piece[..PIECE.min(wanted - done)];
            data.read_exact(piece)?;
            if memory.write_slice(piece, vm_memory::GuestAddress(at + done as u64)).is_err() {
                return Ok(Status::IoError);
            }
            done += piece.len();
        }
        Ok(Status::Ok)
    }

    /// Segments of 16 bytes: sector, number of sectors, flags.
    fn write_zeroes(&mut self, segments: &mut Reader<'_>) -> Result<Status, BadQueue> {
        let mut segment = [0; 16];
        if segments.available_bytes() != segment.len() {
            return Ok(Status::IoError);
        }
        segments.read_exact(&mut segment)?;
        let word =
            |range: std::ops::Range<usize>| segment[range].iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        let bytes = word(8..12) * SECTOR;
        let (Some(at), Some(memory)) = (self.place(word(0..8), bytes), &self.memory) else { return Ok(Status::IoError) };
        self.piece.fill(0);
        let mut done = 0;
        while done < bytes {
            let piece = &self.piece[..PIECE.min(usize::try_from(bytes - done).unwrap_or(PIECE))];
            if memory.write_slice(piece, vm_memory::GuestAddress(at + done)).is_err() {
                return Ok(Status::IoError);
            }
            done += piece.len() as u64;
        }
        Ok(Status::Ok)
    }
}

impl VirtioDevice for Disk {
    const NAME: &'static str = "virtio-disk";
    const ID: u32 = 2;
    const QUEUES: &'static [u16] = &[128];
    const FEATURES: u64 = F_SEG_MAX | F_FLUSH | F_WRITE_ZEROES;

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&(self.bytes / SECTOR).to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        // The most sectors and segments of one write of zeros; they may not be taken away.
        let sectors = u32::try_from(REQUEST_MAX / SECTOR).unwrap_or(u32::MAX);
        config[48..52].copy_from_slice(&sectors.to_le_bytes());
        config[52..56].copy_from_slice(&1u32.to_le_bytes());
        config
    }

    fn notified(&mut self, queue: u16, queues: &mut [Queue], ram: &Ram) -> Result<bool, BadQueue> {
        self.piece.resize(PIECE, 0);
        let used = each_chain(&mut queues[usize::from(queue)], ram, |chain| {
            let mut request = reader(ram, &chain)?;
            let mut room = writer(ram, &chain)?;
            // The status is the last byte that there is room for.
            let Some(data_len) = room.available_bytes().checked_sub(1) else { return Ok(Some(0)) };
            let mut status_byte = room.split_at(data_len)?;
            let (written, status) = self.serve(&mut request, &mut room)?;
            status_byte.write_all(&[status as u8])?;
            Ok(Some(used_len(written + 1)))
        });
        // Kept by nobody but machines that use their disk.
        self.piece = Vec::new();
        used
    }

    fn reset(&mut self) {}

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), BadDeviceState> {
        Ok(())
    }
}
