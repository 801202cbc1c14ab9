//! Gives the open ports of an edge that runs to one that is started in its folder, so that an upgrade refuses nobody.
//!
//! Whoever starts an edge looks for one that runs there. It asks it, over a unix socket in the folder, for its listening
//! sockets themselves (`SCM_RIGHTS`, unix(7)): a connection that waits in a socket's backlog is accepted by whichever
//! process comes first, and none is refused. Then it opens the edge's copy of its routes, which the old one has closed by
//! then, and says that it serves once it has at least the revision that the old one served (I5). Only then does the old
//! one leave, and its connections go on to their end. If the new one dies before, or is not ready in time, the old one
//! goes on as before.
//!
//! The conversation: the new one connects; the old one sends an [`Offer`] as one line of JSON, then its sockets in the
//! order in which the offer lists them; the new one answers with one byte. The socket is for the edge's own user alone.

use crate::own_socket;
use holdfast_model::agent::Stamp;
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;

/// The socket's name in the edge's folder.
pub const TAKE_OVER_SOCKET: &str = "edge-take-over.sock";
/// How long the new edge waits for the sockets: the old one closes its copy of the routes first.
pub const OFFER_TIME_OUT: Duration = Duration::from_secs(15);
/// How much longer than the new edge may take the old one waits for its word, so that the new one is gone when the old
/// one goes on.
const ANSWER_BEYOND: Duration = Duration::from_secs(10);
/// The version of the conversation.
const VERSION: u32 = 1;
/// The longest offer, in bytes: 65,535 ports on a few addresses.
const OFFER_BYTES_MAX: usize = 16 << 20;
/// Sockets in one message; the kernel takes 253.
const SOCKETS_A_MESSAGE: usize = 64;
/// Stands beside each message of sockets, which cannot be empty.
const BESIDE_SOCKETS: u8 = b'.';
/// What the new edge says when it serves.
const SERVES: u8 = b'S';

/// Sockets that an edge listens on, to be used by another process.
pub type Inherited = BTreeMap<SocketAddr, OwnedFd>;

/// Why an edge did not take over from another. The one that ran goes on.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// The socket of the folder cannot be used.
    #[error("The socket {path} cannot be used; check that its folder exists and can be written.")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The conversation broke.
    #[error("Taking over the edge's ports broke off; start the new edge again.")]
    Broken(#[source] io::Error),
    /// It took too long.
    #[error("Taking over the edge's ports was not done within {} s; start the new edge again.", .0.as_secs())]
    TimedOut(Duration),
    /// The other process is somebody else's.
    #[error("A process of user {0} asked for the edge's ports, and was refused.")]
    Foreign(u32),
    /// The offer cannot be read.
    #[error(
        "The edge that runs in this folder offers its ports in a way that this program does not understand; stop it first, then start this one."
    )]
    Malformed(#[source] Option<serde_json::Error>),
    /// The new edge does not know what the old one serves.
    #[error("This edge does not come to serve revision {0}, which the one that runs serves; it goes on.")]
    Behind(String),
}

impl From<io::Error> for TakeOverError {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// What the old edge says before its sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Offer {
    version: u32,
    /// What it serves; the new one is to serve that, or what came later.
    serving: Option<Stamp>,
    /// What its sockets listen on, in their order.
    listening: Vec<SocketAddr>,
}

/// Where a successor would ask.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
}

/// Somebody who asks for the ports.
#[derive(Debug)]
pub struct Successor {
    stream: UnixStream,
}

/// What the edge that ran gave; it goes on unless [`Taken::serves`] says that this one does.
#[derive(Debug)]
pub struct Taken {
    stream: UnixStream,
    serving: Option<Stamp>,
}

/// Takes the ports of the edge that runs in this folder; none when there is none.
///
/// # Errors
/// [`TakeOverError`] when there is one that does not give them.
pub async fn take(data_dir: &Path) -> Result<Option<(Inherited, Taken)>, TakeOverError> {
    let path = data_dir.join(TAKE_OVER_SOCKET);
    let stream = match UnixStream::connect(&path).await {
        Ok(stream) => stream,
        // None ever ran, or the one that did was killed.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(source) => return Err(TakeOverError::Socket { path, source }),
    };
    own(&stream)?;
    let (offer, sockets) = timeout(OFFER_TIME_OUT, receive(&stream))
        .await
        .map_err(|_| TakeOverError::TimedOut(OFFER_TIME_OUT))??;
    let mut inherited = Inherited::new();
    for (address, socket) in offer.listening.into_iter().zip(sockets) {
        // What is not what it is said to be would serve one port's routes on another.
        let bound = rustix::net::getsockname(&socket).map_err(io::Error::from)?;
        if SocketAddr::try_from(bound).ok() != Some(address) {
            return Err(TakeOverError::Malformed(None));
        }
        inherited.insert(address, socket);
    }
    Ok(Some((inherited, Taken { stream, serving: offer.serving })))
}

impl Taken {
    /// Waits until this edge serves what the other one served, and says so: from then on the other one leaves.
    ///
    /// # Errors
    /// [`TakeOverError::Behind`] when that is not so `within` a time, others when the old edge is gone.
    pub async fn serves(
        mut self,
        mut applied: watch::Receiver<Option<Stamp>>,
        within: Duration,
    ) -> Result<(), TakeOverError> {
        if let Some(wanted) = self.serving {
            let there = applied.wait_for(|stamp| stamp.is_some_and(|stamp| at_least(&stamp, &wanted)));
            match timeout(within, there).await {
                Ok(Ok(_)) => {}
                _ => return Err(TakeOverError::Behind(wanted.revision.to_string())),
            }
        }
        Ok(self.stream.write_all(&[SERVES]).await?)
    }
}

fn at_least(stamp: &Stamp, wanted: &Stamp) -> bool {
    stamp.cluster == wanted.cluster
        && (stamp.incarnation, stamp.revision) >= (wanted.incarnation, wanted.revision)
}

impl Door {
    /// Makes the socket, in place of one that an earlier process left.
    ///
    /// # Errors
    /// [`TakeOverError::Socket`].
    pub fn open(data_dir: &Path) -> Result<Self, TakeOverError> {
        let path = data_dir.join(TAKE_OVER_SOCKET);
        match own_socket::bind(&path) {
            Ok(listener) => Ok(Self { listener }),
            Err(source) => Err(TakeOverError::Socket { path, source }),
        }
    }

    /// Waits for a successor.
    ///
    /// # Errors
    /// When accepting fails, or somebody else's process asks; the next one may be right.
    pub async fn knocked(&self) -> Result<Successor, TakeOverError> {
        let (stream, _) = self.listener.accept().await?;
        own(&stream)?;
        Ok(Successor { stream })
    }
}

impl Successor {
    /// Gives the ports away and waits for the word that the successor serves, which it says `within` a time.
    ///
    /// # Errors
    /// [`TakeOverError`] when there is no such word: this edge is to go on.
    pub async fn give(
        mut self,
        serving: Option<Stamp>,
        sockets: Vec<(SocketAddr, OwnedFd)>,
        within: Duration,
    ) -> Result<(), TakeOverError> {
        let within = within + ANSWER_BEYOND;
        let conversation = async {
            send(&mut self.stream, serving, &sockets).await?;
            match self.stream.read_u8().await? {
                SERVES => Ok(()),
                _ => Err(TakeOverError::Malformed(None)),
            }
        };
        timeout(within, conversation).await.map_err(|_| TakeOverError::TimedOut(within))?
    }
}

/// Whether the other side is of this process's user; the socket's mode says so too, where its folder's does not.
fn own(stream: &UnixStream) -> Result<(), TakeOverError> {
    let user = stream.peer_cred()?.uid();
    if user == rustix::process::geteuid().as_raw() { Ok(()) } else { Err(TakeOverError::Foreign(user)) }
}

async fn send(
    stream: &mut UnixStream,
    serving: Option<Stamp>,
    sockets: &[(SocketAddr, OwnedFd)],
) -> Result<(), TakeOverError> {
    let listening = sockets.iter().map(|(address, _)| *address).collect();
    let mut offer = serde_json::to_vec(&Offer { version: VERSION, serving, listening })
        .map_err(|error| TakeOverError::Malformed(Some(error)))?;
    offer.push(b'\n');
    stream.write_all(&offer).await?;
    for some in sockets.chunks(SOCKETS_A_MESSAGE) {
        let fds: Vec<BorrowedFd<'_>> = some.iter().map(|(_, socket)| socket.as_fd()).collect();
        let send = || {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(SOCKETS_A_MESSAGE))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            let beside = [IoSlice::new(&[BESIDE_SOCKETS])];
            Ok(sendmsg(stream.as_fd(), &beside, &mut control, SendFlags::NOSIGNAL)?)
        };
        stream.async_io(Interest::WRITABLE, send).await?;
    }
    Ok(())
}

async fn receive(stream: &UnixStream) -> Result<(Offer, Vec<OwnedFd>), TakeOverError> {
    let mut heard = Heard::default();
    loop {
        heard.parse()?;
        if let Some(offer) = heard.offer.take_if(|offer| heard.sockets.len() >= offer.listening.len()) {
            if heard.sockets.len() > offer.listening.len() {
                return Err(TakeOverError::Malformed(None));
            }
            return Ok((offer, heard.sockets));
        }
        stream.async_io(Interest::READABLE, || heard.read(stream)).await?;
        if heard.bytes.len() > OFFER_BYTES_MAX {
            return Err(TakeOverError::Malformed(None));
        }
    }
}

/// What has come so far. Sockets are told apart by their order alone: the kernel keeps it, and may join bytes.
#[derive(Debug, Default)]
struct Heard {
    bytes: Vec<u8>,
    sockets: Vec<OwnedFd>,
    /// Once its line is complete.
    offer: Option<Offer>,
}

impl Heard {
    fn read(&mut self, stream: &UnixStream) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(SOCKETS_A_MESSAGE))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let got = recvmsg(stream.as_fd(), &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(sockets) = message {
                self.sockets.extend(sockets);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) {
            // Too few descriptors are free here; a port would be lost.
            return Err(rustix::io::Errno::MFILE.into());
        }
        if got.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes.extend_from_slice(&buffer[..got.bytes]);
        Ok(())
    }

    fn parse(&mut self) -> Result<(), TakeOverError> {
        if self.offer.is_none()
            && let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n')
        {
            let offer: Offer = serde_json::from_slice(&self.bytes[..end])
                .map_err(|error| TakeOverError::Malformed(Some(error)))?;
            if offer.version != VERSION {
                return Err(TakeOverError::Malformed(None));
            }
            self.offer = Some(offer);
        }
        Ok(())
    }
}
