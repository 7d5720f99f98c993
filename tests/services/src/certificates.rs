use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use crate::Failure;

/// A certificate authority of the test's own, and what it signed for a server on 127.0.0.1 and for a client: `ca.pem`,
/// `server.pem`, `server.key`, `client.pem`, `client.key`.
#[derive(Debug)]
pub struct Certificates {
    folder: TempDir,
}

impl Certificates {
    /// Made anew.
    pub fn make() -> Result<Self, Failure> {
        let folder = TempDir::with_prefix("fleetcache-certificates-")?;
        let write = |name: &str, pem: String| std::fs::write(folder.path().join(name), pem);
        let mut ca = CertificateParams::new(vec![])?;
        ca.distinguished_name.push(DnType::CommonName, "the tests' authority");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate()?;
        write("ca.pem", ca.self_signed(&ca_key)?.pem())?;
        let issuer = Issuer::new(ca, ca_key);
        for (name, of) in [("server", "127.0.0.1"), ("client", "client")] {
            let key = KeyPair::generate()?;
            let mut certificate = CertificateParams::new(vec![of.to_owned()])?;
            certificate.distinguished_name.push(DnType::CommonName, name);
            write(&format!("{name}.pem"), certificate.signed_by(&key, &issuer)?.pem())?;
            write(&format!("{name}.key"), key.serialize_pem())?;
        }
        Ok(Self { folder })
    }

    /// Where a file is.
    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    /// What is in it.
    pub fn pem(&self, name: &str) -> Result<Vec<u8>, Failure> {
        Ok(std::fs::read(self.path(name))?)
    }
}
