-- Puts a value in place, whatever is there, unless the caller has given up. KEYS: the cell. ARGV: cell, milliseconds to
-- keep it, the server's time in milliseconds after which it is too late.
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) > tonumber(ARGV[3]) then
    return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
