//! A seqpacket socket: whole messages, in order, with descriptors, and an end that shows.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketFlags, SocketType,
};
use serde::Serialize;
use thiserror::Error;

use super::protocol::{self, DESCRIPTORS_MAX, MESSAGE_SIZE_MAX, Message};

/// One end.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

/// A message that has come, and what came with it.
#[derive(Debug)]
pub(crate) struct Received<M> {
    pub(crate) message: M,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// Why nothing was received.
#[derive(Debug, Error)]
pub(crate) enum ReceiveError {
    #[error("the other end is gone")]
    Gone,
    #[error("receiving failed: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Bad(#[from] protocol::BadMessage),
}

impl Channel {
    /// Both ends.
    pub(crate) fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let channels = (Self(a), Self(b));
        for channel in [&channels.0, &channels.1] {
            // Room for two of the largest messages: neither end waits for the other over one.
            rustix::net::sockopt::set_socket_send_buffer_size(&channel.0, 2 * MESSAGE_SIZE_MAX)?;
        }
        Ok(channels)
    }

    pub(crate) fn over(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    pub(crate) fn into_descriptor(self) -> OwnedFd {
        self.0
    }

    /// Sends a message and copies of `descriptors`.
    pub(crate) fn send<M: Message + Serialize>(&self, message: &M, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_bytes(&protocol::encode(message), descriptors)
    }

    /// Sends a message that is encoded already.
    pub(crate) fn send_bytes(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        assert!(descriptors.len() <= DESCRIPTORS_MAX, "a message within its limits");
        if bytes.len() > MESSAGE_SIZE_MAX {
            return Err(rustix::io::Errno::MSGSIZE.into());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)), "room for all of them");
        }
        rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
        })?;
        Ok(())
    }

    /// Waits for a message. `buffer` is made as large as it needs to be.
    pub(crate) fn receive<M: Message>(&self, buffer: &mut Vec<u8>) -> Result<Received<M>, ReceiveError> {
        self.receive_with(buffer, RecvFlags::empty())
    }

    fn receive_with<M: Message>(&self, buffer: &mut Vec<u8>, flags: RecvFlags) -> Result<Received<M>, ReceiveError> {
        // Its length first: a buffer for the longest would cost every worker as much memory as all the rest of it.
        let peek = flags | RecvFlags::PEEK | RecvFlags::TRUNC;
        let looked =
            rustix::io::retry_on_intr(|| rustix::net::recvmsg(&self.0, &mut [], &mut RecvAncillaryBuffer::new(&mut []), peek));
        let length = match looked {
            Err(rustix::io::Errno::CONNRESET) => return Err(ReceiveError::Gone),
            looked => looked.map_err(io::Error::from)?.bytes,
        };
        if length > MESSAGE_SIZE_MAX {
            // Left where it is: nobody speaks with this end any more.
            return Err(protocol::BadMessage::TooLong.into());
        }
        buffer.resize(buffer.len().max(length), 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC)
        });
        let received = match received {
            Err(rustix::io::Errno::CONNRESET) => return Err(ReceiveError::Gone),
            received => received.map_err(io::Error::from)?,
        };
        let descriptors: Vec<OwnedFd> = ancillary
            .drain()
            .flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
                _ => Vec::new(),
            })
            .collect();
        if received.bytes == 0 {
            return Err(ReceiveError::Gone);
        }
        if received.flags.bits() & libc::MSG_TRUNC.cast_unsigned() != 0 {
            return Err(protocol::BadMessage::TooLong.into());
        }
        // MSG_CTRUNC: this process has no room for all of the descriptors. The message is whole; whoever needs them misses them.
        Ok(Received { message: protocol::decode(&buffer[..received.bytes])?, descriptors })
    }

    /// The message that is there, if there is one.
    pub(crate) fn try_receive<M: Message>(&self, buffer: &mut Vec<u8>) -> Result<Option<Received<M>>, ReceiveError> {
        match self.receive_with(buffer, RecvFlags::DONTWAIT) {
            Err(ReceiveError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            received => received.map(Some),
        }
    }

    /// Ends the conversation, for both ends.
    pub(crate) fn shut_down(&self) {
        // ENOTCONN: the other end was faster.
        rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both).unwrap_or_default();
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
