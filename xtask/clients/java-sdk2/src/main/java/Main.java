import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.util.List;
import software.amazon.awssdk.auth.credentials.DefaultCredentialsProvider;
import software.amazon.awssdk.core.util.VersionInfo;

/**
 * Resolves credentials through the default provider chain and prints one line of JSON; then again for every line that comes
 * in, by a new chain, or with the argument {@code keep} by the same one.
 */
public class Main {
    public static void main(String[] arguments) throws Exception {
        boolean keep = List.of(arguments).contains("keep");
        var input = new BufferedReader(new InputStreamReader(System.in));
        DefaultCredentialsProvider chain = null;
        do {
            if (chain == null || !keep) {
                chain = DefaultCredentialsProvider.builder().build();
            }
            resolve(chain);
        } while (input.readLine() != null);
    }

    private static void resolve(DefaultCredentialsProvider chain) {
        long began = System.nanoTime();
        String answer;
        try {
            var found = chain.resolveCredentials();
            String expires = found.expirationTime().map(at -> "\"" + at + "\"").orElse("null");
            String source = found.providerName().map(name -> "\"" + name + "\"").orElse("null");
            answer = "\"access_key_id\":\"" + found.accessKeyId() + "\",\"expires\":" + expires + ",\"source\":" + source;
        } catch (RuntimeException e) {
            answer = "\"error\":\"" + e.toString().replace("\\", "\\\\").replace("\"", "'").replace("\n", " ") + "\"";
        }
        long ms = (System.nanoTime() - began) / 1_000_000;
        System.out.println("{\"version\":\"aws-sdk-java " + VersionInfo.SDK_VERSION + "\",\"ms\":" + ms + "," + answer + "}");
    }
}
