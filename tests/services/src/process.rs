use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, PoisonError, mpsc};

use rustix::process::{Pid, Signal, kill_process};

use crate::Failure;

/// A server's process. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    program: String,
    arguments: Vec<String>,
    /// The package that holds the program.
    package: &'static str,
    /// Where what it prints goes.
    log: PathBuf,
    child: Mutex<Option<Child>>,
}

type Order = (Command, mpsc::Sender<std::io::Result<Child>>);

/// Starts every process from one thread that lives as long as this one: the kernel ends a child together with the thread
/// that started it (`setpriv --pdeathsig`), so that no server outlives a test that is killed.
static KEEPER: LazyLock<mpsc::Sender<Order>> = LazyLock::new(|| {
    let (orders, inbox) = mpsc::channel::<Order>();
    std::thread::spawn(move || {
        for (mut command, reply) in inbox {
            let _ = reply.send(command.spawn());
        }
    });
    orders
});

impl Process {
    /// Starts `program`, which the Debian package `package` holds; what it prints goes to `log`.
    pub fn start(program: &str, arguments: Vec<String>, package: &'static str, log: PathBuf) -> Result<Self, Failure> {
        let process = Self { program: program.to_owned(), arguments, package, log, child: Mutex::new(None) };
        process.restart()?;
        Ok(process)
    }

    /// Starts it again, with the same arguments, after [`Self::kill`].
    pub fn restart(&self) -> Result<(), Failure> {
        if !installed(&self.program) {
            let (program, package) = (&self.program, self.package);
            return Err(format!("{program} is missing: install it by `apt-get install {package}`").into());
        }
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", &self.program]).args(&self.arguments);
        let log = File::options().create(true).append(true).open(&self.log)?;
        command.stdin(Stdio::null()).stderr(log.try_clone()?).stdout(log);
        let (reply, started) = mpsc::channel();
        KEEPER.send((command, reply))?;
        *self.child.lock().unwrap_or_else(PoisonError::into_inner) = Some(started.recv()??);
        Ok(())
    }

    /// The process id, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Child::id)
    }

    /// Whether it ended by itself, and what it printed.
    pub fn ended(&self) -> Option<String> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let running = child.as_mut()?;
        running.try_wait().ok().flatten()?;
        Some(std::fs::read_to_string(&self.log).unwrap_or_default())
    }

    /// `kill -9`.
    pub fn kill(&self) {
        let child = self.child.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut child) = child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// `kill -STOP`: it keeps its connections and answers nothing.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// `kill -CONT`.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let id = self.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(id) = id {
            let _ = kill_process(id, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn installed(program: &str) -> bool {
    if program.contains('/') {
        return std::path::Path::new(program).exists();
    }
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|folder| folder.join(program).exists())
}
