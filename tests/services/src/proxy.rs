use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::Failure;

/// What a proxy does to connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Bytes take so much longer, each way.
    Delay(Duration),
    /// No bytes come through, either way. What was sent meanwhile arrives late, when the fault ends.
    Blackhole,
    /// What the server sends is lost.
    HalfOpen,
    /// Connections are reset, old and new.
    Reset,
    /// Nobody listens, and old connections are reset.
    Refuse,
    /// Each connection is closed once the server has sent so many bytes.
    CutAfter(usize),
}

/// A port of 127.0.0.1 before another one, with faults to be switched on.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    fault: watch::Sender<Fault>,
}

impl Proxy {
    /// Before `target`, on a free port.
    pub fn start(target: u16) -> Result<Self, Failure> {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let (fault, faults) = watch::channel(Fault::None);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // Ends when the handle is dropped: the channel closes.
        std::thread::spawn(move || runtime.block_on(serve(listener, target, faults)));
        Ok(Self { port, fault })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Begins a fault, or ends it.
    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }
}

async fn serve(listener: std::net::TcpListener, target: u16, mut faults: watch::Receiver<Fault>) {
    let Ok(address) = listener.local_addr() else { return };
    let mut listener = TcpListener::from_std(listener).ok();
    loop {
        let fault = *faults.borrow_and_update();
        if fault == Fault::Refuse {
            listener = None;
        } else if listener.is_none() {
            listener = TcpListener::bind(address).await.ok();
        }
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = faults.changed() => if changed.is_err() { return },
            accepted = accepted => {
                if let Ok((client, _)) = accepted {
                    tokio::spawn(connection(client, target, faults.clone()));
                }
            }
        }
    }
}

async fn connection(client: TcpStream, target: u16, faults: watch::Receiver<Fault>) {
    // What is cut off ends with a reset, as a dead machine's connection does.
    let _ = client.set_zero_linger();
    let _ = client.set_nodelay(true);
    if matches!(*faults.borrow(), Fault::Reset | Fault::Refuse) {
        return;
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
    let _ = server.set_nodelay(true);
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    tokio::select! {
        () = pump(from_client, to_server, faults.clone(), false) => {}
        () = pump(from_server, to_client, faults, true) => {}
    }
}

/// Carries bytes one way until the connection ends or is to be ended.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut faults: watch::Receiver<Fault>, of_server: bool) {
    let mut buffer = vec![0; 64 * 1024];
    let mut carried = 0;
    loop {
        let fault = *faults.borrow_and_update();
        match fault {
            Fault::Reset | Fault::Refuse => return,
            Fault::Blackhole => {
                if faults.changed().await.is_err() {
                    return;
                }
                continue;
            }
            _ => {}
        }
        let count = tokio::select! {
            changed = faults.changed() => {
                if changed.is_err() {
                    return;
                }
                continue;
            }
            count = from.read(&mut buffer) => count.unwrap_or(0),
        };
        if count == 0 {
            return;
        }
        let mut bytes = &buffer[..count];
        let fault = *faults.borrow();
        match fault {
            Fault::Delay(delay) => tokio::time::sleep(delay).await,
            Fault::HalfOpen if of_server => continue,
            Fault::CutAfter(limit) if of_server => bytes = &bytes[..count.min(limit.saturating_sub(carried))],
            _ => {}
        }
        carried += bytes.len();
        if to.write_all(bytes).await.is_err() || bytes.len() < count {
            return;
        }
    }
}
